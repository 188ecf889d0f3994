"""The reading half of the codec. Only the constructors named here are ever called."""

from __future__ import annotations

import base64
import collections
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .encoder import DEFAULT_FACTORIES, MAX_DEPTH, NUMPY_KINDS, TAG, dtype_name

_DTYPES = {dtype_name(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


class Decoder:
    """Builds one tree. `decode` raises whatever a malformed skeleton provokes; `codec.decode` catches it."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._built: dict[str, Tensor] = {}  # so that a shared tensor stays one
        self._depth = 0

    def decode(self, node: Any) -> Any:
        if not isinstance(node, list | dict):
            return node
        self._depth += 1
        if self._depth > MAX_DEPTH + 1:  # a leaf may be an object too
            raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
        value = self._container(node)
        self._depth -= 1
        return value

    def _container(self, node: list[Any] | dict[str, Any]) -> Any:
        if isinstance(node, list):
            return [self.decode(item) for item in node]
        if TAG in node:
            tag = node[TAG]
            return _SCALARS[tag](node) if tag in _SCALARS else _CONTAINERS[tag](self, node)
        return {key: self.decode(item) for key, item in node.items()}

    def entries(self, node: dict[str, Any]) -> list[tuple[Any, Any]]:
        return [(self.decode(key), self.decode(value)) for key, value in node["items"]]

    def items(self, node: dict[str, Any]) -> list[Any]:
        return [self.decode(item) for item in node["items"]]

    def tensor(self, node: dict[str, Any]) -> Tensor:
        name = node["name"]
        if name not in self._built:
            self._built[name] = _restore(self._named(name), node)
        return self._built[name]

    def numpy(self, node: dict[str, Any]) -> Any:
        import numpy as np

        dtype = np.dtype(node["dtype"])
        if dtype.kind not in NUMPY_KINDS:
            raise ValueError(f"numpy data of dtype {dtype}")
        if "bytes" in node:
            return np.frombuffer(bytes.fromhex(node["bytes"]), dtype)[0]
        data = self._named(node["name"]).numpy().tobytes()
        return np.frombuffer(bytearray(data), dtype).reshape(node["shape"])

    def _named(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise ValueError(f"tensor {name!r} is missing")
        return self._tensors[name]


def _restore(data: Tensor, node: dict[str, Any]) -> Tensor:
    if "dtype" in node:
        data = data.view(_DTYPES[node["dtype"]]).reshape(node["shape"])
    if "order" in node:
        order = node["order"]
        inverse = sorted(range(len(order)), key=order.__getitem__)
        data = data.permute(order).contiguous().permute(inverse)
    return data


def _ordered(decoder: Decoder, node: dict[str, Any]) -> Any:
    value: Any = collections.OrderedDict(decoder.entries(node))
    if "metadata" in node:
        value._metadata = decoder.decode(node["metadata"])
    return value


def _defaultdict(decoder: Decoder, node: dict[str, Any]) -> Any:
    return collections.defaultdict(DEFAULT_FACTORIES[node["factory"]], decoder.entries(node))


def _complex(node: dict[str, Any]) -> complex:
    return complex(*struct.unpack(">dd", bytes.fromhex(node["bits"])))


_SCALARS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "int": lambda node: int(node["hex"], 16),
    "float": lambda node: struct.unpack(">d", bytes.fromhex(node["bits"]))[0],
    "complex": _complex,
    "bytes": lambda node: base64.b64decode(node["base64"], validate=True),
    "dtype": lambda node: _DTYPES[node["value"]],
    "device": lambda node: torch.device(node["value"]),
    "path": lambda node: Path(node["value"]),
}
_CONTAINERS: dict[str, Callable[[Decoder, dict[str, Any]], Any]] = {
    "dict": lambda decoder, node: dict(decoder.entries(node)),
    "tuple": lambda decoder, node: tuple(decoder.items(node)),
    "set": lambda decoder, node: set(decoder.items(node)),
    "Size": lambda decoder, node: torch.Size(decoder.items(node)),
    "OrderedDict": _ordered,
    "Counter": lambda decoder, node: collections.Counter(dict(decoder.entries(node))),
    "defaultdict": _defaultdict,
    "tensor": Decoder.tensor,
    "numpy": Decoder.numpy,
}
