"""The course of a run, read back from its event log."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainwarden.report.text import Number, as_number

INTERVENTIONS: Mapping[str, str] = {
    "step_skipped": "s",
    "data_skipped": "d",
    "micro_batch_shrunk": "m",
    "checkpoint_rejected": "x",
    "checkpoint_failed": "f",
    "thermal_pause": "t",
    "memory_pressure": "p",
    "device_unhealthy": "h",
    "sensors_silent": "?",
    "stop_requested": "!",
    "resumed": "r",
}
"""What the guard did or saw, by the name of its event, with the letter that marks it under the curve."""

BARS = "▁▂▃▄▅▆▇█"
BARS_ASCII = "_.,-=+*#"
NOT_FINITE, NOT_FINITE_ASCII = "×", "x"


@dataclass
class History:
    """What the log of a run says.

    Attributes:
        losses: ``(step, loss)`` of each log line, by step; NaN where every step of it was skipped. What a
            resume took back is not among them.
        interventions: ``(step, name of the event)``, in the order in which they happened.
        last_step: the newest step any event speaks of; ``None`` when none does.
        checkpoint_path: the newest checkpoint that was verified.
        starts: how often the run was started.
    """

    losses: list[tuple[int, float]] = field(default_factory=list)
    interventions: list[tuple[int, str]] = field(default_factory=list)
    last_step: int | None = None
    checkpoint_path: str | None = None
    starts: int = 0

    @classmethod
    def read(cls, events: Iterable[Mapping[str, Any]]) -> History:
        """The history told by records as `trainwarden.runs.read_events` gives them; others are skipped."""
        history = cls()
        for event in events:
            history.add(event)
        return history

    def add(self, event: Mapping[str, Any]) -> None:
        """Take in the next record of the log; one that names no step is skipped."""
        step = event.get("step")
        if isinstance(step, int) and not isinstance(step, bool):
            self._add(step, str(event["event"]), event)

    def _add(self, step: int, name: str, event: Mapping[str, Any]) -> None:
        if name == "resumed":
            self._take_back(step + 1)
        elif name == "run_started":
            self.starts += 1
        elif name == "metrics_logged":
            loss = _loss(event.get("loss"))
            if loss is not None:
                self._take_back(step)
                self.losses.append((step, loss))
        elif name == "checkpoint_saved":
            self.checkpoint_path = str(event.get("path"))
        if name in INTERVENTIONS:
            self.interventions.append((step, name))
        self.last_step = step

    def _take_back(self, step: int) -> None:
        """Forget the losses from ``step`` on: that part of the run was done again."""
        while self.losses and self.losses[-1][0] >= step:
            self.losses.pop()

    def counts(self) -> dict[str, int]:
        """How often the guard did what."""
        names = [name for _, name in self.interventions]
        return {name: names.count(name) for name in INTERVENTIONS if name in names}


def _loss(value: Number) -> float | None:
    try:
        return as_number(value)
    except (TypeError, ValueError):
        return None


def sparkline(losses: Sequence[tuple[int, float]], *, width: int = 60, unicode: bool = True) -> str:
    """The losses as one line of bars, at most ``width`` characters; what is not finite is marked so.

    Bars go from the lowest to the highest of the means that are shown.
    """
    bars, mark = (BARS, NOT_FINITE) if unicode else (BARS_ASCII, NOT_FINITE_ASCII)
    # Halved, because the distance of two floats may be more than a float can hold.
    halves = [sum(group) / len(group) / 2 for group in _columns(losses, width)]
    shown = [half for half in halves if math.isfinite(half)]
    low = min(shown, default=0.0)
    span = max(shown, default=0.0) - low

    def bar(half: float) -> str:
        if not math.isfinite(half):
            return mark
        return bars[round((len(bars) - 1) * ((half - low) / span))] if span > 0 else bars[0]

    return "".join(map(bar, halves))


def marks(losses: Sequence[tuple[int, float]], interventions: Sequence[tuple[int, str]], *, width: int = 60) -> str:
    """A line to stand under ``sparkline`` of the same losses: a letter where the guard did something.

    Two different letters at one place read ``*``.
    """
    columns = min(width, len(losses))
    if not columns:
        return ""
    line = [" "] * columns
    steps = [step for step, _ in losses]
    for step, name in interventions:
        index = min(bisect.bisect_left(steps, step), len(steps) - 1)
        column = index * columns // len(losses)
        letter = INTERVENTIONS[name]
        line[column] = letter if line[column] in (" ", letter) else "*"
    return "".join(line).rstrip()


def _columns(losses: Sequence[tuple[int, float]], width: int) -> list[list[float]]:
    """The losses in at most ``width`` groups of neighbours, none of them empty."""
    columns = min(width, len(losses))
    groups: list[list[float]] = [[] for _ in range(columns)]
    for index, (_, loss) in enumerate(losses):
        groups[index * columns // len(losses)].append(loss)
    return groups
