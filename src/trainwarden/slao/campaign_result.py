"""How far a campaign has come, and how it ends when not everything succeeded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trainwarden.errors import PartialBatchError, WardenError


@dataclass(frozen=True)
class TaskOutcome:
    """Where a task of a campaign stands.

    Attributes:
        state: ``merged``, ``failed`` (with code and message), or ``waiting`` in a campaign that was ended before it.
        attempt: from 1; 0 before the first.
        run_dir: of its newest attempt, None before the first.
        snapshot: of its merge, with its weight λ.
        losses: held-out losses (nats a token) by task after its merge, or of the merge that the gate held back.
    """

    name: str
    state: Literal["merged", "failed", "waiting"]
    attempt: int
    run_dir: str | None
    snapshot: int | None
    weight: float | None
    losses: Mapping[str, float] | None
    code: str | None
    message: str | None


@dataclass(frozen=True)
class CampaignResult:
    """How far a campaign has come. ``merged_path`` loads with plain peft, once a task is merged."""

    output_dir: str
    merged_path: str
    tasks: tuple[TaskOutcome, ...]

    @property
    def status(self) -> Literal["finished", "unfinished"]:
        """Whether every task is merged."""
        return "finished" if all(task.state == "merged" for task in self.tasks) else "unfinished"

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable; a loss that is no number as text."""
        tasks = [{**vars(task), "losses": task.losses and writable(task.losses)} for task in self.tasks]
        return {"status": self.status, **vars(self), "tasks": tasks}


def writable(losses: Mapping[str, float]) -> dict[str, float | str]:
    """Losses as JSON can hold them: NaN and infinity as text."""
    return {task: loss if math.isfinite(loss) else str(loss) for task, loss in losses.items()}


def conclude(result: CampaignResult, failures: Mapping[str, WardenError]) -> CampaignResult:
    """The result of a campaign that has come to its end, if all of it succeeded.

    Args:
        failures: of the tasks that are not merged.

    Raises:
        PartialBatchError: some tasks are merged and others failed.
        WardenError: all failed; it is the failure of the first one.
    """
    failed = [task for task in result.tasks if task.state != "merged"]
    if not failed:
        return result
    done = [task.name for task in result.tasks if task.state == "merged"]
    if not done:
        raise failures[failed[0].name]
    raise PartialBatchError(
        what="tasks",
        failed_count=len(failed),
        total=len(result.tasks),
        success_percent=round(100 * len(done) / len(result.tasks)),
        failures=", ".join(f"{task.name} ({task.code})" for task in failed),
        failed=[{"task": t.name, "code": t.code, "message": t.message, "run_dir": t.run_dir} for t in failed],
        done=done,
    )
