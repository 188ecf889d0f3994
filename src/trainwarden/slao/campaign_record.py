"""What a campaign remembers between two starts, on disk as durably as a checkpoint.

Only what nothing else knows is kept: attempts, what they began with, evaluations, failures. What is merged the
accumulator's history says, and what is trained the directories of the runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainwarden.checkpoint import CheckpointStore
from trainwarden.errors import CheckpointError, SLAOCheckpointError

from .campaign_plan import Attempt, Evaluation, Failure

FORMAT_VERSION = 1
_KIND = "slao campaign"


@dataclass(frozen=True)
class CampaignRecord:
    """The newest attempt at each task, and the merge settings that the campaign was begun with."""

    attempts: Mapping[str, Attempt] = field(default_factory=dict)
    merge: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """As it is stored."""
        return {
            "kind": _KIND,
            "format_version": FORMAT_VERSION,
            "merge": self.merge,
            "attempts": {task: _attempt_json(attempt) for task, attempt in self.attempts.items()},
        }

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> CampaignRecord:
        """The record that `to_json` made. Raises KeyError, TypeError, ValueError, AttributeError."""
        return cls({task: _attempt_of(one) for task, one in content["attempts"].items()}, content["merge"])


class CampaignLog:
    """The record of one campaign: each version a checkpoint without tensors, so that a damaged one is passed over.

    One process writes at a time: see the campaign's lock.
    """

    def __init__(self, directory: Path, *, on_rejected: Callable[[Path, str], None]) -> None:
        """Touches nothing. ``on_rejected`` is told of each version that is found damaged."""
        self._store = CheckpointStore(directory, keep_last=2)
        self._on_rejected = on_rejected
        self._version = 0

    def read(self) -> CampaignRecord:
        """The newest version that verifies; an empty one where there is none. Raises SLAOCheckpointError."""
        try:
            newest = self._store.load_newest(on_rejected=self._on_rejected)
        except CheckpointError as error:
            raise _as_ours(error) from error
        if newest is None:
            return CampaignRecord()
        self._version = newest.step
        if newest.meta.get("kind") != _KIND or newest.meta.get("format_version") != FORMAT_VERSION:
            problem = "it is not the record of a campaign in this format"
            raise SLAOCheckpointError(operation="load", path=newest.path, problem=problem)
        try:
            return CampaignRecord.of_json(newest.meta)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"its entries make no sense ({error})"
            raise SLAOCheckpointError(operation="load", path=newest.path, problem=problem) from error

    def write(self, record: CampaignRecord) -> None:
        """Store a new version, and verify it. Raises SLAOCheckpointError and DiskFullError."""
        try:
            self._store.save(self._version + 1, {}, record.to_json())
        except CheckpointError as error:
            raise _as_ours(error) from error
        self._version += 1


def _as_ours(error: CheckpointError) -> SLAOCheckpointError:
    return SLAOCheckpointError(
        operation=str(error.details["operation"]),
        path=str(error.details["path"]),
        problem=str(error.details["problem"]),
    )


def _attempt_json(attempt: Attempt) -> dict[str, Any]:
    values = asdict(attempt)
    if attempt.evaluation is not None:
        losses = attempt.evaluation.losses
        values["evaluation"]["losses"] = {task: v if math.isfinite(v) else str(v) for task, v in losses.items()}
    return values


def _attempt_of(values: Mapping[str, Any]) -> Attempt:
    evaluation, failure = values["evaluation"], values["failure"]
    if evaluation is not None:
        losses = {task: float(loss) for task, loss in evaluation["losses"].items()}
        evaluation = Evaluation(int(evaluation["parent"]), str(evaluation["digest"]), losses)
    return Attempt(
        number=int(values["number"]),
        started_from=values["started_from"],
        settings=dict(values["settings"]),
        evaluation=evaluation,
        failure=None if failure is None else Failure(**failure),
    )
