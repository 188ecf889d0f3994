"""Whether the result of a merge may stand: a pure decision over norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .factors import Kind
from .norms import TensorNorms
from .policy import MergePolicy

_ROUNDING = 1e-3
"""Float32 sums of squares over the largest factors are exact to about 1e-5; a real violation is far above."""


@dataclass(frozen=True)
class Divergence:
    """The first tensor that must not stand, why, and the norm that it may have."""

    norms: TensorNorms
    problem: str
    limit: float


def judge(norms: Sequence[TensorNorms], policy: MergePolicy) -> Divergence | None:
    """The first divergence, or None: every norm finite, within its bound, and not grown out of proportion.

    The bound follows from the arithmetic: with λ in (0, 1] a result of ``slao`` and ``average`` lies between its
    two inputs, so that its norm cannot exceed the larger of theirs; more means damaged memory or mixed-up keys.
    Growth is measured against the accumulator's norm of the same tensor, or, where that is smaller, against
    the root mean square over all tensors of its kind: a layer that the tasks before have hardly used may begin.
    """
    before: dict[Kind, list[float]] = {kind: [] for kind in Kind}
    for tensor in norms:
        before[tensor.kind].append(tensor.before)
    usual = {kind: _root_mean_square(values) for kind, values in before.items()}
    for tensor in norms:
        if not math.isfinite(tensor.after):
            return Divergence(tensor, "the result is not finite", math.inf)
        bound = norm_bound(tensor, policy) * (1 + _ROUNDING)
        if tensor.after > bound:
            problem = f"its norm {tensor.after:.4g} exceeds {bound:.4g}, which these inputs cannot give"
            return Divergence(tensor, problem, bound)
        reference = max(tensor.before, usual[tensor.kind])
        limit = policy.max_norm_growth * reference
        if reference > 0 and tensor.after > limit:
            problem = f"its norm would grow from {tensor.before:.4g} to {tensor.after:.4g}, the limit is {limit:.4g}"
            return Divergence(tensor, problem, limit)
    return None


def norm_bound(tensor: TensorNorms, policy: MergePolicy) -> float:
    """The largest norm that the arithmetic of the mode can give to a tensor."""
    pruned = tensor.kind in (Kind.A, Kind.B)
    if policy.mode == "ties" and pruned:
        return math.hypot(tensor.before, tensor.incoming)  # each value is one of the two, or between them
    if policy.mode == "dare" and pruned:
        return max(tensor.before, tensor.incoming / policy.density)
    return max(tensor.before, tensor.incoming)


def _root_mean_square(values: Sequence[float]) -> float:
    return math.hypot(*values) / math.sqrt(len(values)) if values else 0.0
