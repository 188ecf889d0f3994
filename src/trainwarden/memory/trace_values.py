"""Values of small tensors that come from no weight, kept beside the fake ones: positions, masks, lengths.

Models look at these to decide what to compute (is any token padded?), and fake tensors have none. Where a tensor
follows from the example batch or from constants alone, its values are computed for real as well. Whatever comes from
weights stays unknown.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

LARGEST = 1 << 20
LARGEST_FLOATING = 1 << 16
"""Elements of a tensor whose values are kept. Masks are whole numbers, or ones in float32."""
UNKNOWN = object()

_VALUES = "_warden_values"
_FORGOTTEN = "_warden_forgotten"
_ATEN = torch.ops.aten
_READS = frozenset({_ATEN._local_scalar_dense.default, _ATEN.equal.default})
_SHAPED_BY_VALUES = frozenset(
    {
        _ATEN.nonzero.default,
        _ATEN.masked_select.default,
        _ATEN._unique2.default,
        _ATEN.unique_consecutive.default,
        _ATEN.bincount.default,
        _ATEN.repeat_interleave.Tensor,
        _ATEN.repeat_interleave.self_int,
    }
)
_INDEXED = frozenset(
    {
        _ATEN.index.Tensor,
        _ATEN.index_put.default,
        _ATEN.index_put_.default,
        _ATEN._index_put_impl_.default,
        _ATEN._unsafe_index.Tensor,
    }
)
_WITHOUT_VALUES = frozenset(
    {
        _ATEN.empty.memory_format,
        _ATEN.empty_strided.default,
        _ATEN.empty_like.default,
        _ATEN.new_empty.default,
        _ATEN.new_empty_strided.default,
    }
)
NEEDS_VALUES = _READS | _SHAPED_BY_VALUES
"""Operators that fake tensors cannot execute."""


def keep_values(fake: torch.Tensor, real: torch.Tensor) -> None:
    """Keeps a copy of ``real``'s values with ``fake`` if it has values, is small, and holds whole numbers."""
    real_values = real.device.type == "cpu" and not isinstance(real, FakeTensor)
    if real_values and _worth_keeping(real) and not real.dtype.is_floating_point:
        with _disable_current_modes():
            setattr(fake, _VALUES, real.detach().clone())


def from_values(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operator of `NEEDS_VALUES` returns, on fake tensors; `UNKNOWN` if that cannot be told."""
    result = _compute(func, args, kwargs)
    if result is UNKNOWN or func in _READS:
        return result
    return pytree.tree_map_only(torch.Tensor, _fake_with_values, result)


def with_known_indices(func: Any, args: Any) -> Any:
    """Selecting by a mask of known values is selecting by the places where it is true: then the shape is known."""
    if func not in _INDEXED or not any(_is_mask(index) for index in args[1]):
        return args
    places: list[Any] = []
    for index in args[1]:
        if not _is_mask(index):
            places.append(index)
            continue
        values = _values_of(index)
        if values is None:
            return args
        with _disable_current_modes():
            found = values.nonzero(as_tuple=True)
        places.extend(_fake_with_values(place) for place in found)
    return args[0], places, *args[2:]


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def follow_values(func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Does to the known values what ``func`` did to the fake tensors; what it wrote of unknown values is forgotten."""
    if func._schema.is_mutable:
        if _compute(func, args, kwargs) is UNKNOWN:
            _forget_written(func, args, kwargs)
    elif isinstance(out, torch.Tensor) and _worth_keeping(out) and not _begins_unknown(args):
        result = _compute(func, args, kwargs)
        if isinstance(result, torch.Tensor):
            setattr(out, _VALUES, result)


@contextmanager
def masks_judged_by_values() -> Iterator[None]:
    """transformers, if it is loaded, leaves out masks that mask nothing; for fake tensors it never does unless told.

    A mask that is not left out costs a tensor of sequence length squared and copies of keys and values, up to 6.5 % of
    a run's memory that it does not really need.
    """
    module = sys.modules.get("transformers.masking_utils")
    original = getattr(module, "is_tracing", None)
    if module is None or original is None:
        yield
        return
    module.is_tracing = _never  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.is_tracing = original  # type: ignore[attr-defined]


def _never(*_: Any) -> bool:
    return False


def _worth_keeping(tensor: torch.Tensor) -> bool:
    if tensor.dtype.is_complex:
        return False
    return tensor.numel() <= (LARGEST_FLOATING if tensor.dtype.is_floating_point else LARGEST)


def _values_of(tensor: torch.Tensor) -> torch.Tensor | None:
    if not isinstance(tensor, FakeTensor):
        return tensor
    values: torch.Tensor | None = getattr(tensor, _VALUES, None)
    return None if values is None or getattr(values.untyped_storage(), _FORGOTTEN, False) else values


def _begins_unknown(args: Any) -> bool:
    """Spares most operators a closer look."""
    return bool(args) and isinstance(args[0], FakeTensor) and not hasattr(args[0], _VALUES)


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    if torch.Tag.nondeterministic_seeded in func.tags or func in _WITHOUT_VALUES:
        return UNKNOWN
    leaves, spec = pytree.tree_flatten((args, kwargs or {}))
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            values = _values_of(leaf)
            if values is None:
                return UNKNOWN
            leaves[index] = values
    with _disable_current_modes(), torch.no_grad():
        known_args, known_kwargs = pytree.tree_unflatten(leaves, spec)
        return func(*known_args, **known_kwargs)


def _forget_written(func: Any, args: Any, kwargs: Any) -> None:
    """Views share the values' storage as the fake tensors share theirs, so that all of them are forgotten."""
    given = dict(kwargs or {})
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        written = args[index] if index < len(args) else given.get(argument.name)
        for leaf in pytree.tree_leaves(written):
            if isinstance(leaf, FakeTensor) and hasattr(leaf, _VALUES):
                setattr(getattr(leaf, _VALUES).untyped_storage(), _FORGOTTEN, True)


def _fake_with_values(real: torch.Tensor) -> torch.Tensor:
    fake = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device="cpu")
    if _worth_keeping(real):
        setattr(fake, _VALUES, real)
    return fake
