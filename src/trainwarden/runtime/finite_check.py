"""Whether losses and gradients are finite, at the bandwidth of memory: the alarm before any exact pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from trainwarden.runtime.culprit import values_of
from trainwarden.runtime.sharded import group_of, summed

NARROW = {torch.float32, torch.float16, torch.bfloat16}
"""Types whose norms are taken in float32, since a half-precision norm overflows above 65,504; others keep their own."""
_SMALL = 4096
"""Elements up to which copying tensors together is quicker than a kernel for each of them (measured: 100 tensors of
1,024 elements, 105 µs against 172)."""


def looks_finite(gradients: Sequence[Tensor], losses: Sequence[Tensor] = ()) -> bool:
    """False when anything may be non-finite, on any rank. One reduction at memory bandwidth and one value read.

    NaN and infinity survive addition; a sum that overflows only leads to the exact pass.
    """
    small: list[Tensor] = []
    large: list[Tensor] = []
    for tensor in (*losses, *gradients):
        if type(tensor) is not Tensor or not tensor.is_cpu or tensor.is_sparse or tensor.dtype not in NARROW:
            return _looks_finite_anywhere(gradients, losses)
        (large if tensor.numel() > _SMALL else small).append(tensor)
    total = 0.0
    if small:
        together: Tensor = _flatten_dense_tensors(small)  # type: ignore[no-untyped-call]
        total = together.sum(dtype=torch.float32).item()
    if large:
        # Of bfloat16 the norm is as wide as float32's, and three times as quick in its own type.
        dtype = torch.float32 if any(tensor.dtype is torch.float16 for tensor in large) else None
        for norm in torch._foreach_norm(large, 2, dtype):
            total += norm.item()
    return math.isfinite(total)


def norms_of(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The L2 norm of each gradient, of its piece on this rank, 0-d on its device; float32 or wider.

    8-bit floats are widened for it.
    """
    dense = [values_of(gradient) for gradient in gradients]
    dense = [values.float() if values.dtype.itemsize == 1 else values for values in dense]
    wide = any(values.dtype not in NARROW for values in dense)
    return list(torch._foreach_norm(dense, 2, None if wide else torch.float32)) if dense else []


def _looks_finite_anywhere(gradients: Sequence[Tensor], losses: Sequence[Tensor]) -> bool:
    """`looks_finite` for tensors of any kind, on any device, in pieces on several ranks."""
    scalars = [*norms_of(gradients), *losses]
    if not scalars:
        return True
    first = scalars[0]
    total = float(torch.stack([scalar.to(first).reshape(()) for scalar in scalars]).sum())
    group = group_of(gradients)
    if group is not None:
        total = float(summed(torch.tensor(total, dtype=torch.float64), group))
    return math.isfinite(total)


def losses_bad(losses: Sequence[Tensor], device: torch.device) -> Tensor:
    """Whether any of the losses is not finite: a bool, 0-d, on ``device``."""
    if not losses:
        return torch.zeros((), dtype=torch.bool, device=device)
    return ~torch.stack([loss.to(device).float().reshape(()) for loss in losses]).isfinite().all()


def largest_magnitudes(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """The maximum norm of each gradient, ``[gradients]`` float32 on ``device``, without waiting for it.

    It cannot overflow (but for float64, whose norms are taken as flags), so a verdict by it is exact without a second
    pass. Of an empty gradient it is 0.
    """
    if not gradients:
        return torch.zeros(0, device=device)
    values = [values_of(gradient).detach() for gradient in gradients]
    values = [numbers.float() if numbers.dtype.itemsize == 1 else numbers for numbers in values]
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, numbers in enumerate(values):
        if numbers.numel():  # of nothing there is no maximum
            kinds.setdefault((numbers.device, numbers.dtype), []).append(index)
    # Put together from scalars: an index made of Python numbers would be sent to the device, which waits for it.
    found = [torch.zeros((), device=device)] * len(gradients)
    for (_, dtype), indices in kinds.items():
        norms = torch.stack(list(torch._foreach_norm([values[index] for index in indices], math.inf))).abs()
        if dtype not in NARROW:
            norms = torch.where(norms.isfinite(), torch.zeros_like(norms), norms)
        norms = norms.to(device).float()
        if len(indices) == len(gradients):
            return norms
        for index, norm in zip(indices, norms.unbind(), strict=True):
            found[index] = norm
    return torch.stack(found)
