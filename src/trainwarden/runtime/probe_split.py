"""Whether a loss may be split at all: one forward-only comparison at the first split of a run.

A loss that is a mean over independent rows (or over weighted targets) satisfies
``loss(whole) = sum of share(part) * loss(part)``. A summed loss, a contrastive loss and batch statistics do not.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.overrides import TorchFunctionMode

REPETITIONS = 16
"""Evaluations of a loss that turns out to be random (noise drawn inside it, not dropout)."""

STANDARD_ERRORS = 4.0
"""How far two means may differ by chance: a sound loss is refused wrongly less than once in a thousand runs."""

# The dropout probability's name and position in each function that takes one.
_DROPOUT_ARGUMENT: dict[Any, tuple[str, int]] = {
    functional.dropout: ("p", 1),
    functional.dropout1d: ("p", 1),
    functional.dropout2d: ("p", 1),
    functional.dropout3d: ("p", 1),
    functional.alpha_dropout: ("p", 1),
    functional.feature_alpha_dropout: ("p", 1),
    functional.scaled_dot_product_attention: ("dropout_p", 4),
    functional.multi_head_attention_forward: ("dropout_p", 10),
}


class _NoDropout(TorchFunctionMode):
    """Runs forward passes without dropout while every module stays in training mode, so that BatchNorm shows itself."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        arguments = dict(kwargs or {})
        if func not in _DROPOUT_ARGUMENT:
            return func(*args, **arguments)
        name, position = _DROPOUT_ARGUMENT[func]
        if len(args) > position:
            return func(*args[:position], 0.0, *args[position + 1 :], **arguments)
        return func(*args, **{**arguments, name: 0.0})


@dataclass(frozen=True)
class SplitEvidence:
    """Losses of a batch, whole and as the weighted sum of its parts; several of each when they are random.

    ``tolerance`` is relative and covers rounding.
    """

    whole: tuple[float, ...]
    parts: tuple[float, ...]
    tolerance: float

    @property
    def consistent(self) -> bool:
        """Whether the parts make up the whole, up to rounding and chance."""
        whole, parts = statistics.fmean(self.whole), statistics.fmean(self.parts)
        if not (math.isfinite(whole) and math.isfinite(parts)):
            return math.isfinite(whole) == math.isfinite(parts)  # a NaN tells nothing about splitting
        chance = STANDARD_ERRORS * math.hypot(_standard_error(self.whole), _standard_error(self.parts))
        return abs(whole - parts) <= self.tolerance * max(abs(whole), 1e-6) + chance


def gather_evidence(
    compute_loss: Callable[[Any], torch.Tensor],
    whole: Any,
    parts: Sequence[Any],
    shares: Sequence[float],
    models: Sequence[nn.Module],
) -> SplitEvidence:
    """Evaluates a batch and its parts under ``no_grad``, without dropout; module buffers are put back afterwards.

    The caller restores the random state. Raises whatever ``compute_loss`` raises.
    """

    def of_whole() -> float:
        return float(compute_loss(whole))

    def of_parts() -> float:
        # A part of no weight (no targets) has no mean.
        weighted = ((part, share) for part, share in zip(parts, shares, strict=True) if share)
        return sum(float(compute_loss(part)) * share for part, share in weighted)

    with torch.no_grad(), _NoDropout(), _buffers_restored(models):
        first, second = of_whole(), of_whole()
        repetitions = 1 if first == second else REPETITIONS
        wholes = (first, *(of_whole() for _ in range(repetitions - 1)))
        sums = tuple(of_parts() for _ in range(repetitions))
    return SplitEvidence(wholes, sums, 2e-2 if _computes_narrow(models) else 1e-3)


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def batch_statistics_layer(models: Sequence[nn.Module]) -> str | None:
    """The name and type of a layer that normalises over the batch in training mode, or ``None``."""
    for model in models:
        for name, module in model.named_modules():
            if isinstance(module, (_BatchNorm, _LazyNormBase)) and module.training:
                if isinstance(module, nn.modules.instancenorm._InstanceNorm):
                    continue  # statistics of one sample: a split does not touch them
                return f"{name or 'model'} ({type(module).__name__})"
    return None


def _computes_narrow(models: Sequence[nn.Module]) -> bool:
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        return True
    return any(p.dtype in (torch.float16, torch.bfloat16) for model in models for p in model.parameters())


@contextmanager
def _buffers_restored(models: Sequence[nn.Module]) -> Iterator[None]:
    buffers = [buffer for model in models for buffer in model.buffers()]
    saved = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, saved, strict=True):
            buffer.copy_(value)
