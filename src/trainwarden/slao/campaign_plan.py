"""What a campaign does next, and whether a merge may stand: pure decisions over what is recorded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainwarden.errors import ResumeMismatchError, WardenError

from .campaign_config import OnFailure
from .records import Record

TASK_STATUSES = frozenset({65, 66, 70, 78, 80, 81, 83})
"""Exit statuses of failures that lie in a task: its data, its settings, its training, its merge. Others, a full disk,
a missing model, a broken GPU, a request to stop, would meet the next task as well, and end the campaign."""


@dataclass(frozen=True)
class Failure:
    """How an attempt at a task ended."""

    code: str
    message: str
    exit_code: int


@dataclass(frozen=True)
class Evaluation:
    """Held-out losses of a merge that was proposed: mean nats a token, by task, of those that have held-out rows.

    ``parent`` is the snapshot that the merge was computed from, ``digest`` that of the adapter.
    """

    parent: int
    digest: str
    losses: Mapping[str, float]


@dataclass(frozen=True)
class Attempt:
    """The newest attempt at a task.

    Attributes:
        number: from 1; each has a directory of its own.
        started_from: the digest of the adapter that its training began with; None for a start of peft's own.
        settings: what its result depends on, by dotted key.
        evaluation: of its merge, once it was proposed.
        failure: how it ended, if it failed.
    """

    number: int
    started_from: str | None
    settings: Mapping[str, Any]
    evaluation: Evaluation | None = None
    failure: Failure | None = None


@dataclass(frozen=True)
class Facts:
    """What a campaign finds when it looks.

    Attributes:
        attempts: what is recorded of each task that was begun.
        merged: the tasks in the accumulator.
        trained: tasks whose newest attempt has a complete adapter on disk.
        head: the digest of the newest adapter in the accumulator, as it was trained; None when it is empty.
        failed: tasks that failed since the campaign was started; earlier failures are tried again.
    """

    attempts: Mapping[str, Attempt] = field(default_factory=dict)
    merged: frozenset[str] = frozenset()
    trained: frozenset[str] = frozenset()
    head: str | None = None
    failed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Train:
    """Train this task, in the directory of this attempt: it is begun there, or goes on where it was."""

    task: str
    attempt: int


@dataclass(frozen=True)
class Merge:
    """Merge the trained adapter of this task."""

    task: str


@dataclass(frozen=True)
class Stop:
    """End with the failure of this task."""

    task: str


@dataclass(frozen=True)
class Finish:
    """Nothing is left to do."""


Action = Train | Merge | Stop | Finish


def next_action(settings: Mapping[str, Mapping[str, Any]], facts: Facts, on_failure: OnFailure) -> Action:
    """What comes next.

    The first task in the order that is not in the accumulator is trained and merged. A training that began from
    another adapter than the accumulator's newest is begun anew, since the merge needs its lineage; so is one that
    failed under other settings. All other work is gone on with, or taken as it is.

    Args:
        settings: of all tasks, in their order.
        facts: what is on disk, and what failed just now.
    """
    for task, wanted in settings.items():
        if task in facts.merged:
            continue
        if task in facts.failed:
            if on_failure == "stop":
                return Stop(task)
            continue
        attempt = facts.attempts.get(task)
        if attempt is None:
            return Train(task, 1)
        if not _continues(attempt, wanted, facts.head):
            return Train(task, attempt.number + 1)
        return Merge(task) if task in facts.trained else Train(task, attempt.number)
    return Finish()


def _continues(attempt: Attempt, wanted: Mapping[str, Any], head: str | None) -> bool:
    if attempt.started_from != head:
        return False
    return attempt.failure is None or not differences(attempt.settings, wanted)


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What is not as it was: ``{key: {"saved": …, "now": …}}``."""
    keys = [*saved, *(key for key in now if key not in saved)]
    return {key: {"saved": saved.get(key), "now": now.get(key)} for key in keys if saved.get(key) != now.get(key)}


def lies_in_task(error: WardenError) -> bool:
    """Whether the next task may do better. Settings that differ from a saved run's are for a person to decide about."""
    return error.exit_code in TASK_STATUSES and not isinstance(error, ResumeMismatchError)


def merged_sources(history: Sequence[Record]) -> tuple[str, ...]:
    """Which adapters are in the accumulator that a history has led to, by their sources, in their order."""
    contents: dict[int, tuple[str, ...]] = {}
    now: tuple[str, ...] = ()
    for record in history:
        if record.action == "rollback":
            now = contents.get(_snapshot_in(record.source), ())
        elif record.action == "start":
            now = (record.source,)
        else:
            now = (*now, record.source)
        contents[record.sequence] = now
    return now


def _snapshot_in(source: str) -> int:
    """The number in ``snapshot 3``, as a rollback's record calls what it went back to."""
    number = source.rpartition(" ")[2]
    return int(number) if number.isdigit() else 0


@dataclass(frozen=True)
class Forgetting:
    """The earlier task that a merge would cost most: how far its loss rises above its lowest; NaN when it is none."""

    task: str
    rise_nats: float


def forgetting(before: Sequence[Mapping[str, float]], proposed: Mapping[str, float], task: str) -> Forgetting | None:
    """What merging ``task`` would cost the earlier tasks at most; None when there is nothing to tell it by.

    Args:
        before: held-out losses after each earlier merge that stands.
        proposed: those with the merge, of the same tasks and of ``task`` itself, which cannot forget yet.
    """
    worst: Forgetting | None = None
    for earlier, loss in proposed.items():
        known = [losses[earlier] for losses in before if math.isfinite(losses.get(earlier, math.nan))]
        if earlier == task or (not known and math.isfinite(loss)):
            continue
        rise = loss - min(known, default=loss)
        if not math.isfinite(rise):
            return Forgetting(earlier, math.nan)
        if worst is None or rise > worst.rise_nats:
            worst = Forgetting(earlier, rise)
    return worst


def regressed(found: Forgetting | None, limit_nats: float | None) -> bool:
    """Whether the gate holds a merge back. A loss that is no number always does, where there is a gate."""
    return limit_nats is not None and found is not None and not found.rise_nats <= limit_nats


def mismatches(
    settings: Mapping[str, Mapping[str, Any]], facts: Facts, accepted: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """Settings by which something that is done would come out differently now, of tasks that are not done anew.

    Args:
        accepted: for each task, the last words of keys that may differ.
    """
    found: dict[str, dict[str, Any]] = {}
    for task, attempt in facts.attempts.items():
        if task not in settings:
            if task in facts.merged:
                found[f"tasks.{task}"] = {"saved": "merged", "now": None}
        elif task in facts.merged or (task in facts.trained and attempt.failure is None):
            for key, values in differences(attempt.settings, settings[task]).items():
                if key.rpartition(".")[2] not in accepted[task]:
                    found[f"tasks.{task}.{key}"] = values
    return found
