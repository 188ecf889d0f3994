"""Loss and gradient norm of each step as host numbers, some steps late and without making the device wait."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepValues:
    """What is known of a step. ``loss`` is the sum of its backward passes' losses; ``None``: unknown."""

    step: int
    loss: float | None
    grad_norm: float | None


@dataclass
class _Sent:
    """Two values on their way from the device, and which of them mean something."""

    step: int
    pair: Tensor
    ready: torch.cuda.Event | None
    has_loss: bool
    has_norm: bool


class LateValues:
    """Takes what the parts of a step give, sends it off when the step is closed, and hands out what has arrived.

    Several optimizers make one step: the norm of its gradient is the root of the sum of their squares. A norm that the
    user's own clipping has measured counts instead: what the gates see was scaled down by then.
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._before_clipping: list[Tensor] = []
        self._sent: deque[_Sent] = deque()

    def note_losses(self, losses: Sequence[Tensor]) -> None:
        """0-d each, of one step's backward passes."""
        self._losses += losses

    def note_norms(self, norms: Sequence[Tensor]) -> None:
        """L2 norms, 0-d each, of some of the step's gradients."""
        self._norms += norms

    def note_clipping(self, norm: Tensor) -> None:
        """The total norm before clipping, 0-d."""
        self._before_clipping.append(norm)

    def close(self, step: int) -> None:
        """Everything noted since the last call belongs to ``step``."""
        losses, self._losses = self._losses, []
        norms = self._before_clipping or self._norms
        self._norms, self._before_clipping = [], []
        parts = (*losses, *norms)
        if not parts:
            return
        device = parts[0].device
        total = _stacked(losses, device).sum() if losses else torch.zeros((), device=device)
        norm = torch.linalg.vector_norm(_stacked(norms, device)) if norms else torch.zeros((), device=device)
        self._send(_Sent(step, torch.stack([total, norm]), None, bool(losses), bool(norms)))

    def poll(self, *, wait: bool = False) -> list[StepValues]:
        """What has arrived, in order of steps; with ``wait`` everything, which synchronises."""
        arrived = []
        while self._sent and (wait or _is_ready(self._sent[0])):
            sent = self._sent.popleft()
            if sent.ready is not None:
                sent.ready.synchronize()
            loss, norm = sent.pair.tolist()
            arrived.append(StepValues(sent.step, loss if sent.has_loss else None, norm if sent.has_norm else None))
        return arrived

    def _send(self, sent: _Sent) -> None:
        if sent.pair.device.type == "cuda":
            host = torch.empty_like(sent.pair, device="cpu", pin_memory=True)
            host.copy_(sent.pair, non_blocking=True)
            sent.ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            sent.ready.record()
            sent.pair = host
        self._sent.append(sent)


def _stacked(scalars: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.stack([scalar.detach().to(device, torch.float32).reshape(()) for scalar in scalars])


def _is_ready(sent: _Sent) -> bool:
    return sent.ready is None or bool(sent.ready.query())  # type: ignore[no-untyped-call]


def both_finite(values: StepValues) -> bool:
    """Whether the step took place with numbers: what was skipped says nothing about the usual range."""
    return all(value is None or math.isfinite(value) for value in (values.loss, values.grad_norm))
