"""What the log lines say, gathered without making the device wait: its scalars are read at log steps only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """Means over the steps of one log line; NaN when all of them were skipped."""

    loss: float
    grad_norm: float
    tokens_per_s: float


@dataclass
class LossHistory:
    """Losses of a run as host numbers, without those of skipped steps."""

    first: float | None = None
    final: float = math.nan
    best: float = math.nan
    total: float = 0.0
    steps: int = 0
    tokens: int = 0

    def add_line(self, losses: list[float]) -> float:
        """Takes the losses of the steps of one line that were not skipped; returns their mean."""
        mean = math.fsum(losses) / len(losses) if losses else math.nan
        self.total += math.fsum(losses)
        self.steps += len(losses)
        self.first = mean if self.first is None else self.first
        self.final = mean
        # min() would keep or lose a NaN depending on the order of its arguments.
        self.best = mean if math.isnan(self.best) or mean < self.best else self.best
        return mean

    @property
    def mean(self) -> float:
        return self.total / self.steps if self.steps else math.nan


@dataclass
class Metrics:
    """The running window and the history; with their state a resumed run logs what an unbroken one would."""

    clock: Callable[[], float] = time.perf_counter
    history: LossHistory = field(default_factory=LossHistory)
    _pending: list[Tensor] = field(default_factory=list)
    _window_tokens: int = 0
    _window_began_s: float = math.nan

    def start_clock(self) -> None:
        """A window's rate counts from here: the time before was not spent on its tokens."""
        self._window_began_s = self.clock()
        self._window_tokens = 0

    def note_step(self, loss: Tensor, grad_norm: Tensor, tokens: int) -> None:
        """``loss`` and ``grad_norm``, 0-d, stay on their device; ``tokens`` are those without padding."""
        self._pending.append(torch.stack([loss.detach().float(), grad_norm.detach().float()]))
        self._window_tokens += tokens
        self.history.tokens += tokens

    def close_window(self) -> Window:
        """Reads the window from the device and begins the next one.

        A step whose loss or gradient norm is not finite was skipped and counts in no mean.
        """
        pairs = self._read_pending()
        now_s = self.clock()
        elapsed_s = now_s - self._window_began_s
        good = [(loss, norm) for loss, norm in pairs if math.isfinite(loss) and math.isfinite(norm)]
        loss = self.history.add_line([loss for loss, _ in good])
        grad_norm = math.fsum(norm for _, norm in good) / len(good) if good else math.nan
        measured = self._window_tokens > 0 and elapsed_s > 0  # a window that came with a checkpoint was not timed here
        rate = self._window_tokens / elapsed_s if measured else math.nan
        self._pending.clear()
        self.start_clock()
        return Window(loss, grad_norm, rate)

    @property
    def window_is_empty(self) -> bool:
        return not self._pending

    def _read_pending(self) -> list[tuple[float, float]]:
        if not self._pending:
            return []
        device = self._pending[-1].device  # pairs that came with a checkpoint lie on the host
        pairs = torch.stack([pair.to(device) for pair in self._pending]).tolist()
        return [(loss, norm) for loss, norm in pairs]

    def state_dict(self) -> dict[str, Any]:
        """Reads the window from the device: for checkpoints."""
        return {**vars(self.history), "pending": [list(pair) for pair in self._read_pending()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        rest = dict(state)
        self._pending = [torch.tensor(pair) for pair in rest.pop("pending")]
        self.history = LossHistory(**rest)
