"""How far a run is, followed in its event log while that grows."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainwarden.events import LEVELS, Event
from trainwarden.report.history import History
from trainwarden.report.text import Number

NOTABLE_KEPT = 5
_NOTABLE_LEVELS = LEVELS[LEVELS.index("notice") :]
_NOTABLE_TOO = frozenset({"stop_requested", "run_finished"})
_IN_A_ROW = frozenset({"step_skipped", "checkpoint_failed"})
"""Events whose sentence counts its predecessors: only the last of a row is worth a line."""
_COUNTED = {
    "data_skipped": "data left out",
    "resumed": "resumes",
    "thermal_pause": "thermal pauses",
    "memory_pressure": "memory pressure",
    "device_unhealthy": "health warnings",
    "sensors_silent": "silent sensors",
    "checkpoint_rejected": "checkpoints rejected",
    "checkpoint_failed": "checkpoints failed",
}
_KINDS = {object.__new__(kind).name: kind for kind in Event.__subclasses__()}
_NOT_FINITE = ("nan", "inf", "-inf")


@dataclass
class Progress:
    """What the log has said so far. ``None`` is *unknown*.

    Attributes:
        history: losses, interventions, last step, newest checkpoint.
        metrics: the newest ``metrics_logged``.
        skipped: steps skipped, counted on from the newest metrics.
        shrinks: micro-batch shrinks, likewise.
        checkpoint_step: of the newest verified checkpoint.
        checkpoint_at: when that was written, ISO-8601.
        last_at: when the newest event was written, ISO-8601.
        ended: how the run ended by its own word, unless it was started again.
        notable: the newest events that a person should see, oldest first.
    """

    history: History = field(default_factory=History)
    metrics: Mapping[str, Any] | None = None
    skipped: int = 0
    shrinks: int = 0
    checkpoint_step: int | None = None
    checkpoint_at: str | None = None
    last_at: str | None = None
    ended: str | None = None
    notable: deque[Mapping[str, Any]] = field(default_factory=lambda: deque(maxlen=NOTABLE_KEPT))
    _times: Counter[str] = field(default_factory=Counter)

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in the next record of the log."""
        name = str(record["event"])
        self.history.add(record)
        self.last_at = _words(record.get("ts")) or self.last_at
        self._times[name] += 1
        if name in ("run_started", "resumed"):
            self.ended = None
        elif name == "run_finished":
            self.ended = _words(record.get("status"))
        elif name == "metrics_logged":
            self.metrics = record
            self.skipped, self.shrinks = _count(record.get("steps_skipped")), _count(record.get("shrinks"))
        elif name == "step_skipped":
            self.skipped += 1
        elif name == "micro_batch_shrunk":
            self.shrinks += 1
        elif name == "checkpoint_saved":
            self.checkpoint_step, self.checkpoint_at = self.history.last_step, self.last_at
        if record.get("level") in _NOTABLE_LEVELS or name in _NOTABLE_TOO:
            self._note(name, record)

    def figure(self, name: str) -> Number:
        """A figure of the newest metrics; ``None`` where it is not told."""
        value = (self.metrics or {}).get(name)
        return value if isinstance(value, int | float) or value in _NOT_FINITE else None

    @property
    def max_steps(self) -> int | None:
        steps = self.figure("max_steps")
        return steps if isinstance(steps, int) and steps > 0 else None

    def counters(self) -> dict[str, int]:
        """What the guard did, how often: skips and shrinks always, all else where it happened."""
        others = {words: self._times[name] for name, words in _COUNTED.items() if self._times[name]}
        return {"skipped": self.skipped, "shrinks": self.shrinks, **others}

    def _note(self, name: str, record: Mapping[str, Any]) -> None:
        if name in _IN_A_ROW and self.notable and self.notable[-1]["event"] == name:
            self.notable.pop()
        self.notable.append(record)


class Follower:
    """Reads on in a log that grows: each call costs what was written since the last one.

    Attributes:
        progress: what was read.
        problem: why nothing can be read now; empty when it can.
    """

    def __init__(self, path: Path) -> None:
        self.progress = Progress()
        self.problem = ""
        self._path = path
        self._offset = 0

    def read_on(self) -> Progress:
        """Take in the lines that are whole by now. A log that does not exist yet has none."""
        self.problem = ""
        try:
            for record in self._records():
                self.progress.add(record)
        except FileNotFoundError:
            self._restart()
        except OSError as error:
            self.problem = f"its events cannot be read: {error.strerror or error}"
        return self.progress

    def _records(self) -> Iterator[dict[str, Any]]:
        with self._path.open("rb") as stream:
            if stream.seek(0, 2) < self._offset:  # another log by now
                self._restart()
            stream.seek(self._offset)
            for line in stream:
                if not line.endswith(b"\n"):  # still being written
                    return
                self._offset += len(line)
                record = _parsed(line)
                if record is not None:
                    yield record

    def _restart(self) -> None:
        self.progress, self._offset = Progress(), 0


def sentence(record: Mapping[str, Any]) -> str:
    """What the event of a record said when it happened; for one that is not known here, its name and step."""
    name = str(record["event"])
    kind = _KINDS.get(name)
    if kind is not None:
        try:
            values = {each.name: _value(record[each.name], str(each.type)) for each in dataclasses.fields(kind)}
            return str(kind(**values))
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
            pass  # written by another version, or by hand
    return f"{name.replace('_', ' ')} (step {record.get('step', 'unknown')})"


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "event" in record else None


def _value(value: Any, kind: str) -> Any:
    """What a field held before it became JSON, which has no NaN."""
    return float(value) if "float" in kind and value in _NOT_FINITE else value


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _words(value: Any) -> str | None:
    return value if isinstance(value, str) else None
