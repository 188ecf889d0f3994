"""TIES and DARE for one pair of tensors, on the pruning and the sign election that peft has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .peft_api import peft_function


def ties(before: Tensor, incoming: Tensor, weight: float, density: float) -> Tensor:
    """The elected-sign mean of two float32 tensors, with weights 1 − ``weight`` and ``weight``.

    Both keep their ``density`` largest values; each position elects the sign with more weighted mass; values of
    that sign are averaged by their weights. For ``weight`` = 1/2 this is peft's `ties` of the pair. For others
    peft's divides by the number of values instead of by their weights: one that is left alone would be scaled,
    again at every merge.
    """
    prune, elect = _peft("prune"), _peft("calculate_majority_sign_mask")
    pair = [before, incoming] if density == 1 else [prune(t, density, method="magnitude") for t in (before, incoming)]
    shape = (2,) + (1,) * before.dim()
    weights = torch.tensor([1 - weight, weight], dtype=before.dtype, device=before.device).view(shape)
    stacked = torch.stack(pair)
    taken = elect(stacked * weights, method="total").to(before.dtype) * weights
    share = taken.sum(dim=0)
    mean: Tensor = (stacked * taken).sum(dim=0) / torch.where(share > 0, share, 1.0)
    return mean


def dare(before: Tensor, incoming: Tensor, weight: float, density: float) -> Tensor:
    """``incoming`` with entries dropped at random and the rest scaled by 1 / ``density``, moved to by ``weight``.

    Only the new adapter is thinned: the accumulator was when its adapters came, and thinning it again at every
    merge would leave few and huge values. Draws from torch's current generator.
    """
    if density < 1:
        incoming = _peft("prune")(incoming, density, method="random", rescale=True)
    return torch.lerp(before, incoming, weight)


def _peft(name: str) -> Any:
    return peft_function("peft.utils.merge_utils", name)
