"""Representations that the user registers, measured now and then: how far their samples are spread out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trainwarden.checkpoint.rng import capture_rng, restore_rng
from trainwarden.errors import InvalidSettingError
from trainwarden.guards.collapse import Collapse, CollapsePolicy, CollapseState, Spread

Source = nn.Module | Callable[[], Tensor]
"""A module, whose output in training is looked at; or a callable that returns the samples, for instance those of a
held-out batch, one row a sample."""

MAX_SAMPLES = 1024
"""Of one measurement; more make the Gram matrix dear and the figures hardly better."""

Reduce = Callable[[Any], Tensor]


def spread_of(samples: Tensor) -> Spread:
    """How far ``samples``, ``[samples, dimensions]``, are spread out. Computed in float64; NaN for fewer than two."""
    rows = samples.detach()[:MAX_SAMPLES].double()
    count = rows.shape[0]
    if count < 2 or rows.shape[1] == 0 or not bool(torch.isfinite(rows).all()):
        return Spread(math.nan, math.nan, math.nan)
    centred = rows - rows.mean(0)
    variance = float(centred.square().sum(0).div(count - 1).mean())
    gram = rows @ rows.T if count <= rows.shape[1] else rows.T @ rows
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    total = float(singular.sum())
    shares = singular / total if total else singular
    rank = math.exp(float(torch.special.entr(shares).sum())) if total else 1.0
    distance = float(torch.pdist(rows).mean())
    return Spread(variance, rank, distance)


def as_samples(output: Any) -> Tensor:
    """The rows of a module's output: all leading dimensions of its first tensor together are samples.

    Raises `InvalidSettingError` when there is no tensor in it, or only a scalar.
    """
    value = output
    while not isinstance(value, Tensor):
        inner = list(value.values()) if isinstance(value, Mapping) else value
        if not isinstance(inner, (list, tuple)) or not inner:
            raise _refused(type(output).__name__)
        value = inner[0]
    if value.ndim == 0:
        raise _refused("a scalar")
    return value.detach().reshape(-1, value.shape[-1]) if value.ndim > 1 else value.detach().reshape(-1, 1)


@dataclass
class Representation:
    """One that is watched. ``reference`` says what its variance is compared with, such as the targets it predicts."""

    name: str
    source: Source
    policy: CollapsePolicy
    reference: Source | None = None
    state: CollapseState = field(default_factory=CollapseState)
    _measured_at: int = 0
    _handles: list[Any] = field(default_factory=list)
    _seen: dict[str, list[Tensor]] = field(default_factory=dict)

    def prepare(self, step: int) -> None:
        """Before ``step`` (from 1): when it is to be measured, its modules' outputs are caught. Else does nothing."""
        if step % self.policy.every_steps == 0 and not self._handles:
            self._catch("own", self.source)
            self._catch("reference", self.reference)

    def measure(self, step: int) -> Collapse | None:
        """After ``step``: what the measurement completes, when one is due."""
        if step % self.policy.every_steps or step == self._measured_at:
            return None
        self._measured_at = step
        self.let_go()
        own, reference = self._samples("own", self.source), self._samples("reference", self.reference)
        self._seen.clear()
        if own is None:
            return None
        compared = None if reference is None else spread_of(reference).variance
        self.state, collapse = self.policy.step(self.state, spread_of(own), compared)
        return collapse

    def let_go(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _catch(self, key: str, source: Source | None) -> None:
        if not isinstance(source, nn.Module):
            return
        caught = self._seen.setdefault(key, [])

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if sum(len(samples) for samples in caught) < MAX_SAMPLES:
                caught.append(as_samples(output).clone())

        self._handles.append(source.register_forward_hook(keep))

    def _samples(self, key: str, source: Source | None) -> Tensor | None:
        if source is None:
            return None
        if isinstance(source, nn.Module):
            caught = self._seen.get(key, [])
            return torch.cat(caught) if caught else None
        streams = capture_rng()
        try:
            with torch.no_grad():
                return as_samples(source())
        finally:
            restore_rng(streams)  # whatever it drew, the training draws what it would have drawn


def _refused(value: str) -> InvalidSettingError:
    expected = "a module or callable whose (first) output is a tensor of samples by dimensions"
    return InvalidSettingError(setting="watch_representation(source=)", value=value, expected=expected)
