"""Which tensor is not finite, and how: the exact pass that runs only after an alarm.

A norm overflows although every element is finite, so only the elements themselves convict.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from trainwarden.guards.finite import Culprit, Kind
from trainwarden.runtime.sharded import local

LOSS = "loss"

_CHUNK = 1 << 22
"""Elements that are looked at in one go: the mask of a large tensor need not fit beside it."""


def values_of(tensor: Tensor) -> Tensor:
    """The numbers of a tensor that lie on this rank."""
    return tensor._values() if tensor.is_sparse else local(tensor)


def is_finite(tensor: Tensor) -> bool:
    """Whether every element on this rank is finite; exact, and reads one value from the device a chunk."""
    return _first_bad(tensor) is None


def kind_of(tensor: Tensor) -> Kind | None:
    """What the first element on this rank is that is not finite; ``None`` when all are."""
    bad = _first_bad(tensor)
    if bad is None:
        return None
    return "nan" if math.isnan(bad) else "+inf" if bad > 0 else "-inf"


def first_culprit(losses: Sequence[Tensor], named_gradients: Iterable[tuple[str, Tensor]]) -> Culprit | None:
    """The first loss, or else the first gradient, that is not finite; ``None`` when everything is.

    Args:
        losses: 0-d, one for each backward pass of the step.
        named_gradients: with the name of the parameter, in order.
    """
    passes = len(losses)
    for index, loss in enumerate(losses):
        kind = kind_of(loss)
        if kind is not None:
            return Culprit(LOSS, kind, index, passes)
    found = first_named(named_gradients)
    # A gradient is the sum over the passes: with several, none can be named.
    return None if found is None else Culprit(found[0], found[1], 0 if passes == 1 else None, passes)


def first_named(named: Iterable[tuple[str, Tensor]]) -> tuple[str, Kind] | None:
    """Name and kind of the first tensor that is not finite."""
    for name, tensor in named:
        kind = kind_of(tensor)
        if kind is not None:
            return name, kind
    return None


def _first_bad(tensor: Tensor) -> float | None:
    """The first value that is not finite, of a complex one the part that is not."""
    for chunk in _chunks(values_of(tensor).detach()):
        bad = ~torch.isfinite(chunk)
        if bool(bad.any()):
            return float(chunk[bad][0])
    return None


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    plain = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    for chunk in torch.split(plain.reshape(-1), _CHUNK):
        # torch (2.13) has no isfinite for 8-bit floats; float32 holds all of their values.
        yield chunk.float() if chunk.dtype.itemsize == 1 else chunk
