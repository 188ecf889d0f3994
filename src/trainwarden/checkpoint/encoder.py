"""The writing half of the codec: a walk over a tree that collects tensors and builds the JSON skeleton."""

from __future__ import annotations

import base64
import collections
import math
import struct
import sys
import types
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .tensorfile import DTYPE_CODES

TAG = "$type"
"""The key that marks an object of the skeleton as something else than a dict with string keys."""
MAX_DEPTH = 100
"""Deeper trees are refused: Python's JSON parser recurses, and no optimizer nests beyond a few levels."""
NUMPY_KINDS = "biufcmM"
"""Kinds of numpy data whose bytes say everything: booleans, numbers, dates and time spans."""
DEFAULT_FACTORIES: dict[str, Callable[[], object] | None] = {
    "None": None,
    **{kind.__name__: kind for kind in (bool, bytes, complex, dict, float, int, list, set, str, tuple)},
    "Counter": collections.Counter,
    "OrderedDict": collections.OrderedDict,
}
_EXACT_INT = 2**53  # other JSON readers keep integers as doubles
# Whole bytes, but no safetensors code that every reader knows: kept as plain bytes.
_RAW_DTYPES = frozenset({torch.complex32, torch.complex128, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2})


class UnstorableError(ValueError):
    """Something in a tree has no place in a checkpoint; the text is ``<place>: <what it is>``."""


class Encoder:
    """One walk over one tree; `tensors` fills as it goes."""

    def __init__(self, place: str) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._nodes: dict[Hashable, Any] = {}  # by the memory a tensor covers
        self._root = place
        self._trail: list[object] = []  # keys and positions from the root to the current value
        self._open: set[int] = set()  # containers that the current value is in

    def encode(self, value: object) -> Any:
        """The skeleton of `value`. Raises UnstorableError."""
        kind = type(value)
        scalar = _SCALARS.get(kind)
        if scalar is not None:
            return scalar(value)
        container = _CONTAINERS.get(kind)
        if container is not None:
            with self._inside(value):
                return container(self, value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, Path):
            return {TAG: "path", "value": str(value)}
        return self._numpy(value)

    @contextmanager
    def _inside(self, container: object) -> Iterator[None]:
        if id(container) in self._open:
            raise self._unstorable("a container that holds itself")
        if len(self._open) >= MAX_DEPTH:
            raise self._unstorable(f"nested more than {MAX_DEPTH} levels deep")
        self._open.add(id(container))
        yield
        self._open.discard(id(container))

    def items(self, values: Iterable[object]) -> list[Any]:
        encoded = []
        for position, value in enumerate(values):
            self._trail.append(position)
            encoded.append(self.encode(value))
            self._trail.pop()
        return encoded

    def entries(self, mapping: dict[Any, Any]) -> list[tuple[Any, Any]]:
        encoded = []
        for key, value in mapping.items():
            self._trail.append(key)
            encoded.append((self.key(key), self.encode(value)))
            self._trail.pop()
        return encoded

    def key(self, key: object) -> Any:
        """A dict key or set element: scalars and tuples of them."""
        if type(key) is tuple:
            return {TAG: "tuple", "items": [self.key(item) for item in key]}
        scalar = _SCALARS.get(type(key))
        if scalar is None:
            raise self._unstorable(f"a key or set element that is {describe(key)}")
        return scalar(key)

    def _tensor(self, tensor: Tensor) -> Any:
        problem = _problem_with(tensor)
        if problem is not None:
            raise self._unstorable(problem)
        memory = _memory_of(tensor)
        if memory is None:
            return self._new_tensor(tensor)
        if memory not in self._nodes:
            self._nodes[memory] = self._new_tensor(tensor)
        return self._nodes[memory]

    def _new_tensor(self, tensor: Tensor) -> Any:
        data = tensor.detach().resolve_conj().resolve_neg()
        node: dict[str, Any] = {TAG: "tensor"}
        order = _memory_order(data)
        if order is not None:
            node["order"] = order
        if data.dtype in _RAW_DTYPES:
            node |= {"dtype": dtype_name(data.dtype), "shape": list(data.shape)}
            data = data.contiguous().reshape(-1).view(torch.uint8)
        return node | {"name": self._add(data)}

    def _numpy(self, value: object) -> Any:
        np = sys.modules.get("numpy")  # a value can only be numpy's if the process has imported it
        if np is None or not (type(value) is np.ndarray or isinstance(value, np.generic)):
            raise self._unstorable(describe(value))
        array: Any = np.asarray(value)
        if array.dtype.kind not in NUMPY_KINDS:
            raise self._unstorable(f"a numpy {type(value).__name__} of dtype {array.dtype}")
        node = {TAG: "numpy", "dtype": array.dtype.str}
        if isinstance(value, np.generic):
            return node | {"bytes": array.tobytes().hex()}
        content = np.frombuffer(bytearray(array.tobytes()), np.uint8)
        return node | {"shape": list(array.shape), "name": self._add(torch.from_numpy(content))}

    def _add(self, data: Tensor) -> str:
        # Safetensors reserves one name and JSON readers other than Python's refuse lone surrogates.
        readable = ".".join(_text(step) for step in self._trail).encode("utf-8", "replace").decode() or "value"
        name, repetition = readable, 1
        while name in self.tensors or name == "__metadata__":
            repetition += 1
            name = f"{readable}#{repetition}"
        self.tensors[name] = data
        return name

    def _unstorable(self, what: str) -> UnstorableError:
        return UnstorableError(f"{self._root}{''.join(_step(step) for step in self._trail)}: {what}")


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def describe(value: object) -> str:
    """What `value` is, in words."""
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType | types.MethodType):
        return "a function"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"an object of type {type(value).__module__}.{type(value).__qualname__}"


def _step(step: object) -> str:
    if isinstance(step, str):
        return f".{step}" if step.isidentifier() else f"[{step!r}]"
    return f"[{_text(step)}]"


def _text(step: object) -> str:
    try:
        return str(step)
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        return "…"


def _problem_with(tensor: Tensor) -> str | None:
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"a tensor subclass ({type(tensor).__name__})"
    if tensor.layout != torch.strided:
        return f"a {str(tensor.layout).removeprefix('torch.')} tensor; store a dense one"
    if tensor.is_quantized:
        return f"a quantized tensor ({dtype_name(tensor.dtype)}); store its int_repr, scale and zero point"
    if tensor.device.type == "meta":
        return "a meta tensor, which has no data"
    if tensor.dtype not in DTYPE_CODES and tensor.dtype not in _RAW_DTYPES:
        return f"a tensor of dtype {dtype_name(tensor.dtype)}"
    return None


def _memory_of(tensor: Tensor) -> Hashable:
    if tensor.numel() == 0:
        return None
    return (
        tensor.device,
        tensor.untyped_storage().data_ptr(),
        tensor.storage_offset(),
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        tensor.is_conj(),
        tensor.is_neg(),
    )


def _memory_order(tensor: Tensor) -> list[int] | None:
    """The dimensions from slowest to fastest, where that is not the usual order and there are no gaps."""
    if tensor.is_contiguous():
        return None
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], tensor.shape[dim] == 1))
    return order if tensor.permute(order).is_contiguous() else None


def _int(value: int) -> Any:
    return value if abs(value) <= _EXACT_INT else {TAG: "int", "hex": hex(value)}


def _float(value: float) -> Any:
    return value if math.isfinite(value) else {TAG: "float", "bits": struct.pack(">d", value).hex()}


def _complex(value: complex) -> Any:
    return {TAG: "complex", "bits": struct.pack(">dd", value.real, value.imag).hex()}


def _dict(encoder: Encoder, value: dict[Any, Any]) -> Any:
    if TAG not in value and all(type(key) is str for key in value):
        return dict(encoder.entries(value))
    return {TAG: "dict", "items": encoder.entries(value)}


def _ordered(encoder: Encoder, value: collections.OrderedDict[Any, Any]) -> Any:
    node = {TAG: "OrderedDict", "items": encoder.entries(value)}
    # load_state_dict hands modules the version their state was saved with, from this attribute.
    metadata = getattr(value, "_metadata", None)
    return node if metadata is None else node | {"metadata": encoder.encode(metadata)}


def _defaultdict(encoder: Encoder, value: collections.defaultdict[Any, Any]) -> Any:
    for name, factory in DEFAULT_FACTORIES.items():
        if value.default_factory is factory:
            return {TAG: "defaultdict", "factory": name, "items": encoder.entries(value)}
    raise encoder._unstorable(f"a defaultdict whose default is {describe(value.default_factory)}")


_SCALARS: dict[type, Callable[[Any], Any]] = {
    type(None): lambda value: value,
    bool: lambda value: value,
    str: lambda value: value,
    int: _int,
    float: _float,
    complex: _complex,
    bytes: lambda value: {TAG: "bytes", "base64": base64.b64encode(value).decode()},
    torch.dtype: lambda value: {TAG: "dtype", "value": dtype_name(value)},
    torch.device: lambda value: {TAG: "device", "value": str(value)},
}
_CONTAINERS: dict[type, Callable[[Encoder, Any], Any]] = {
    dict: _dict,
    list: lambda encoder, value: encoder.items(value),
    tuple: lambda encoder, value: {TAG: "tuple", "items": encoder.items(value)},
    set: lambda encoder, value: {TAG: "set", "items": [encoder.key(item) for item in value]},
    torch.Size: lambda encoder, value: {TAG: "Size", "items": encoder.items(value)},
    collections.OrderedDict: _ordered,
    collections.Counter: lambda encoder, value: {TAG: "Counter", "items": encoder.entries(value)},
    collections.defaultdict: _defaultdict,
}
