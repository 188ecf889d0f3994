"""The console of a run: a bar on a terminal, plain lines elsewhere; all of it on stderr."""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from trainwarden.events import (
    LEVELS,
    Event,
    MetricsLogged,
    MicroBatchShrunk,
    RunFinished,
    StepCompleted,
    StepSkipped,
)
from trainwarden.report import text

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_REFRESHES_PER_S = 4.0
_PROGRESS = (StepCompleted, StepSkipped, MetricsLogged)
"""What begins the bar. Before the first step there is nothing to show, and a resume may move the count."""


class Console:
    """An observer that shows a run to a person: ``Guard("runs/demo", observers=[Console()])``.

    On a terminal a progress bar with the newest figures and notices above it; elsewhere one plain line an
    event. ``NO_COLOR`` is honoured. Steps are counted without being printed.

    Args:
        stream: where to; stderr by default, which leaves stdout to data.
        live: whether to draw a bar; by default when the stream is a terminal that can.
    """

    def __init__(self, stream: TextIO | None = None, *, live: bool | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._draws = can_draw(self._stream) if live is None else live
        self._bar: _Bar | None = None

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if self._draws and isinstance(event, _PROGRESS):
            self._bar = self._bar or _Bar(self._stream, event.step)
        if self._bar is not None:
            self._bar.show(event)
        if isinstance(event, RunFinished):
            self.close()
        if LEVELS.index(event.level) >= LEVELS.index("info") and not self._stands_in_bar(event):
            self._print(event)

    def close(self) -> None:
        """Leave the bar as it stands and give the terminal back. Harmless when called twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stands_in_bar(self, event: Event) -> bool:
        return self._bar is not None and isinstance(event, MetricsLogged)

    def _print(self, event: Event) -> None:
        line = _line(event)
        if self._bar is not None:
            self._bar.print(line)
        else:
            print(line, file=self._stream, flush=True)


class _Bar:
    """rich's progress bar, made at the first event: rich is not imported for a run without a terminal."""

    def __init__(self, stream: TextIO, step: int) -> None:
        from rich.console import Console as Terminal
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._progress: Progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[figures]}", markup=False),
            console=Terminal(file=stream, force_terminal=True, no_color=no_color()),
            refresh_per_second=_REFRESHES_PER_S,
            # What others print must not tear the bar, but stdout is data and never passes through here.
            redirect_stdout=False,
            redirect_stderr=True,
        )
        # A resumed run begins at its step: the time that is left is not reckoned from steps of the past.
        self._task: TaskID = self._progress.add_task("training", total=None, completed=step, figures="")
        self._skips = 0
        self._shrinks = 0
        self._metrics: MetricsLogged | None = None
        self._progress.start()

    def show(self, event: Event) -> None:
        if isinstance(event, MetricsLogged):
            self._metrics, self._skips, self._shrinks = event, event.steps_skipped, event.shrinks
        elif isinstance(event, StepSkipped):
            self._skips += 1
        elif isinstance(event, MicroBatchShrunk):
            self._shrinks += 1
        total: dict[str, Any] = {} if self._metrics is None else {"total": self._metrics.max_steps}
        self._progress.update(self._task, completed=event.step, figures=self._figures(), **total)

    def print(self, line: str) -> None:
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        self._progress.stop()

    def _figures(self) -> str:
        metrics = self._metrics
        fields = []
        if metrics is not None:
            fields = [
                f"loss {text.number(metrics.loss)}",
                f"grad {text.number(metrics.grad_norm, 2)}",
                f"{text.number(metrics.tokens_per_s, 0)} tok/s",
                text.size(metrics.memory_bytes) if metrics.memory_bytes is not None else "memory unknown",
            ]
            if metrics.temperature_c is not None:
                fields.append(text.temperature(metrics.temperature_c))
        if self._skips or self._shrinks:
            fields.append(f"skips {self._skips} · shrinks {self._shrinks}")
        return "  ".join(fields)


def _line(event: Event) -> str:
    # The voice of the guard is told from the figures, as everywhere.
    return str(event) if event.level == "info" else f"warden: {event}"


def can_draw(stream: TextIO) -> bool:
    """Whether ``stream`` is a terminal on which the cursor can be moved."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def no_color() -> bool:
    """Whether ``NO_COLOR`` is set (https://no-color.org)."""
    return bool(os.environ.get("NO_COLOR"))
