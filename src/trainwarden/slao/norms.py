"""Norms that tell at the same time whether values are finite: one pass, and an exact one only on suspicion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .factors import Kind, kind_of

NOT_A_NUMBER, PLUS_INFINITY, MINUS_INFINITY = "NaN", "+Inf", "-Inf"


@dataclass(frozen=True)
class TensorNorms:
    """Euclidean norms of one tensor around one merge. NaN or infinite when its values are."""

    key: str
    before: float
    """In the accumulator."""
    incoming: float
    """In the new adapter."""
    after: float
    """In the result."""

    @property
    def kind(self) -> Kind:
        """The part that the tensor plays."""
        return kind_of(self.key)


def square_sum(values: Tensor) -> Tensor:
    """The sum of squares of float32 ``values``, as a 0-d tensor: nothing is read from a device.

    Not finite if a value is not, and also when finite values are so large that their squares overflow.
    """
    flat = values.reshape(-1)
    return torch.dot(flat, flat)


def norms_of(squares: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[float]:
    """The norms behind ``squares``, read at once; what overflowed is computed again in float64."""
    read = torch.stack(list(squares)).tolist()
    return [
        math.sqrt(square) if math.isfinite(square) else float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
        for square, tensor in zip(read, tensors, strict=True)
    ]


def what_is_not_finite(values: Tensor) -> str | None:
    """``NaN``, ``+Inf`` or ``-Inf``, in this order, or None: the exact look, after a norm has raised suspicion."""
    if bool(values.isnan().any()):
        return NOT_A_NUMBER
    if bool(values.isposinf().any()):
        return PLUS_INFINITY
    return MINUS_INFINITY if bool(values.isneginf().any()) else None


def total(norms: Sequence[TensorNorms], kind: Kind) -> dict[str, float]:
    """The norms of all tensors of a kind taken together: ``before``, ``incoming``, ``after``."""
    chosen = [norm for norm in norms if norm.kind is kind]
    return {
        "before": math.hypot(*(norm.before for norm in chosen)),
        "incoming": math.hypot(*(norm.incoming for norm in chosen)),
        "after": math.hypot(*(norm.after for norm in chosen)),
    }


def as_details(norms: TensorNorms, limit: float | None = None) -> Mapping[str, float]:
    """The norms for an error's details."""
    known = {"before": norms.before, "incoming": norms.incoming, "after": norms.after}
    return known if limit is None else known | {"limit": limit}
