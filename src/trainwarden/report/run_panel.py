"""A run as it stands, for `warden watch`: where it is, how it goes, what the guard did."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from trainwarden.report import text
from trainwarden.report.device_panel import DOUBTFUL, FAINT, GRAVE, clean
from trainwarden.report.history import sparkline
from trainwarden.report.progress import Progress, sentence
from trainwarden.report.runs import page_dict
from trainwarden.runs import RunRecord

_ENDED = frozenset({"finished", "stopped", "failed", "lost"})
_STYLES = {"running": "green", "finished": "green", "stopped": DOUBTFUL, "failed": GRAVE, "lost": GRAVE}
_EVENT_STYLES = {"warning": DOUBTFUL, "error": GRAVE}
_LABEL_COLUMNS = 14
_CURVE_COLUMNS = (10, 60)
_PATH_COLUMNS = 8


@dataclass(frozen=True, kw_only=True)
class RunView:
    """A run by its ledger row and its event log.

    Attributes:
        record: its row; ``None`` when the ledger does not have it.
        problem: what could not be read just now; empty when all could.
    """

    run_id: str
    path: Path
    record: RunRecord | None
    progress: Progress
    problem: str = ""

    @property
    def status(self) -> str:
        """As the ledger has it; where that cannot know (another machine, no row), the run's own last word."""
        if self.record is not None and self.record.status != "unknown":
            return self.record.status
        return self.progress.ended or "unknown"

    @property
    def over(self) -> bool:
        return self.status in _ENDED

    @property
    def step(self) -> int | None:
        told = self.record.steps_completed if self.record is not None and self.over else None
        return self.progress.history.last_step if told is None else told

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable; as ``warden runs show`` gives it, with the state of now."""
        progress = self.progress
        page = page_dict(self.record, None, progress.history, path=str(self.path.absolute()), resume_command=None)
        del page["config"], page["resume_command"]
        return {
            **page,
            "run_id": self.run_id,
            "status": self.status,
            "step": self.step,
            "max_steps": progress.max_steps,
            "loss": _word(progress.figure("loss")),
            "tokens_per_s": _word(progress.figure("tokens_per_s")),
            "checkpoint_step": progress.checkpoint_step,
            "checkpoint_at": progress.checkpoint_at,
            "last_event_at": progress.last_at,
            "counters": progress.counters(),
            "events": [{**record, "sentence": sentence(record)} for record in progress.notable],
            "problem": self.problem,
        }


def run_panel(run: RunView, now: datetime, *, width: int, unicode: bool = True) -> list[RenderableType]:
    """Everything of one run, at most ``width`` columns wide; the newest events first."""
    title = Text.assemble(("run ", "bold"), (clean(run.run_id), "bold"), "  ", _status(run))
    title.append(_standing(run, now), FAINT)
    parts: list[RenderableType] = [title]
    if run.problem:
        parts.append(Text(clean(run.problem), DOUBTFUL))
    parts.append(_grid(list(_rows(run, now, width=width, unicode=unicode))))
    if run.progress.notable:
        parts += [Text("last events", FAINT), _events(run.progress.notable, now)]
    return parts


def runs_panel(runs: Sequence[RunView], *, width: int) -> list[RenderableType]:
    """One line a run, at most ``width`` columns wide: of a long path the end is shown."""
    rows = [_figures(run) for run in runs]
    columns = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for run, row in zip(runs, rows, strict=True):
        line = "".join(f"{cell:<{columns[place]}}  " for place, cell in enumerate(row) if columns[place])
        path, room = clean(str(run.path)), max(_PATH_COLUMNS, width - len(line))
        line += path if len(path) <= room else f"…{path[1 - room :]}"
        lines.append(Text(line, no_wrap=True, overflow="ellipsis"))
    return [Text("running", FAINT), *lines]


def _figures(run: RunView) -> tuple[str, ...]:
    step, of = run.step, run.progress.max_steps
    steps = f"step {text.count(step)}" + ("" if of is None else f"/{of:,}")
    loss, speed = run.progress.figure("loss"), run.progress.figure("tokens_per_s")
    return (
        clean(run.run_id),
        steps,
        "" if loss is None else f"loss {text.number(loss)}",
        "" if speed is None else _rate(speed),
    )


def ago(stamp: str | None, now: datetime) -> str:
    """``3 min 05 s ago``, from an ISO-8601 stamp; a clock that is behind makes it 0."""
    seconds = _since_s(stamp, now)
    if seconds is None:
        return text.UNKNOWN
    return f"{seconds:.0f} s ago" if seconds < 59.5 else f"{text.duration(seconds)} ago"


def _since_s(stamp: str | None, now: datetime) -> float | None:
    try:
        return max(0.0, (now - datetime.fromisoformat(stamp or "")).total_seconds())
    except (ValueError, TypeError):  # no stamp of ours, or one without a time zone
        return None


def _status(run: RunView) -> Text:
    words = run.status
    if words == text.UNKNOWN:
        words += " (not in the ledger)" if run.record is None else " (it runs, or ran, on another machine)"
    if run.status == "lost":
        words += " (its process is gone without a word)"
    return Text(words, _STYLES.get(run.status, DOUBTFUL))


def _standing(run: RunView, now: datetime) -> str:
    record = run.record
    if record is None:
        return ""
    if run.status == "running":
        return f"  process {record.pid}, started {ago(record.started_at, now)}"
    if run.over and record.ended_at is not None:
        return f"  {ago(record.ended_at, now)}"
    return ""


def _rows(run: RunView, now: datetime, *, width: int, unicode: bool) -> Iterator[tuple[str, str]]:
    progress = run.progress
    yield "directory", clean(str(run.path))
    if run.record is not None and run.record.code is not None:
        yield "error", f"{run.record.code} (warden explain {run.record.code})"
    heard = f"  (last event {ago(progress.last_at, now)})" if progress.last_at and not run.over else ""
    yield "step", f"{_steps(run)}{heard}"
    if progress.history.losses or progress.metrics:
        low, high = _CURVE_COLUMNS
        columns = max(low, min(high, width - _LABEL_COLUMNS - 10))
        yield "loss", f"{text.number(_loss(run))}  {sparkline(progress.history.losses, width=columns, unicode=unicode)}"
    speed = progress.figure("tokens_per_s")
    if speed is not None:
        yield "speed", _rate(speed)
    yield "checkpoint", _checkpoint(run, now)
    yield "guard", "  ".join(f"{words} {times}" for words, times in _counters(run).items())


def _steps(run: RunView) -> str:
    step, of = run.step, run.progress.max_steps
    if step is None:
        return text.UNKNOWN
    return f"step {step:,}" if of is None else f"step {step:,}/{of:,} ({100 * step / of:.0f} %)"


def _loss(run: RunView) -> Any:
    if run.over and run.record is not None and run.record.final_loss is not None:
        return run.record.final_loss
    return run.progress.figure("loss")


def _rate(tokens_per_s: Any) -> str:
    real = text.as_number(tokens_per_s)
    return f"{text.UNKNOWN if real is None else f'{real:,.0f}'} tokens/s"


def _checkpoint(run: RunView, now: datetime) -> str:
    progress = run.progress
    if progress.checkpoint_step is None or progress.history.checkpoint_path is None:
        return "none yet"
    name = clean(Path(progress.history.checkpoint_path).name)
    return f"of step {progress.checkpoint_step:,}, written and verified {ago(progress.checkpoint_at, now)}  ({name})"


def _counters(run: RunView) -> dict[str, int]:
    counters = run.progress.counters()
    record = run.record
    if record is not None and run.over:
        told = {"skipped": record.steps_skipped, "shrinks": record.shrinks}
        counters |= {name: times for name, times in told.items() if times is not None}
    return counters


def _events(records: Sequence[Any] | Any, now: datetime) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right", no_wrap=True, style=FAINT)
    table.add_column(overflow="fold")
    for record in reversed(list(records)):
        style = _EVENT_STYLES.get(str(record.get("level")), "")
        table.add_row(ago(record.get("ts"), now), Text(clean(sentence(record)), style))
    return table


def _grid(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style=FAINT)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(label, Text(value))
    return table


def _word(value: text.Number) -> float | str | None:
    # JSON has no NaN: it stays the word that the log has.
    return value if value is None or isinstance(value, str) or value - value == 0 else str(value)
