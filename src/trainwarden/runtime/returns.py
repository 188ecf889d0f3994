"""Going back to an earlier checkpoint: agreed by all ranks, written down, carried out by the next ``watch``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from trainwarden.checkpoint import Checkpoint
from trainwarden.errors import CheckpointError, RollbackNeededError, WardenError
from trainwarden.events import Event, RolledBack
from trainwarden.guards.rollback import Place, Rollback, RollbackPolicy, skipped
from trainwarden.runtime import rollbacks
from trainwarden.runtime.numbers import NumberWatch, Trail, Trouble
from trainwarden.runtime.ranks import Ranks
from trainwarden.runtime.watched import GUARD_PART, Watched


class Returns:
    """The returns of one run, as they stand in its directory. What is collective says so."""

    def __init__(self, policy: RollbackPolicy, run_dir: Path, checkpoints: Path, ranks: Ranks) -> None:
        self._policy = policy
        self._run_dir = run_dir
        self._checkpoints = checkpoints
        self._ranks = ranks
        self._done: list[Rollback] = []

    @property
    def count(self) -> int:
        """How many there are; a checkpoint taken now has them all behind it."""
        return len(self._done)

    def found(self, find: Callable[[], Checkpoint | None]) -> Checkpoint | None:
        """The checkpoint that ``find`` finds, once those that the run has gone back from are out of its way.

        Raises what ``find`` raises, and CheckpointError when the record of the returns cannot be read or a checkpoint
        not be removed. Called by rank 0.
        """
        done = rollbacks.read(self._run_dir)
        checkpoint = find()
        if checkpoint is None or not done:
            return checkpoint
        limit = min((one.checkpoint_step for one in done[_behind(checkpoint) :]), default=checkpoint.step)
        if checkpoint.step <= limit:
            return checkpoint
        rollbacks.drop_newer(self._checkpoints, limit)
        checkpoint = find()
        if checkpoint is not None and checkpoint.step > limit:
            problem = f"the run goes back to step {limit}, and it cannot be removed"
            raise CheckpointError(operation="load", path=checkpoint.path, problem=problem)
        return checkpoint

    def begin(self, checkpoint: Checkpoint | None, watched: Watched, emit: Callable[[Event], None]) -> None:
        """After ``checkpoint`` was loaded: carries out the returns that it has not behind it. Collective."""
        self._done = self._ranks.lead(lambda: rollbacks.read(self._run_dir))
        pending = self._done[_behind(checkpoint) if checkpoint else 0 :]
        if not pending:
            return
        factor = math.prod(one.learning_rate_factor for one in pending)
        rollbacks.scale_learning_rates(watched.optimizers.values(), watched.others, factor)
        newest = pending[-1]
        emit(
            RolledBack(
                step=checkpoint.step if checkpoint else 0,
                first_step=newest.first_step,
                last_step=newest.last_step,
                learning_rate_factor=factor,
                reason=newest.reason,
            )
        )

    def leave_out(self, phase: int) -> Callable[[int, int], bool] | None:
        """Whether the batch of an epoch and index is to be left out; ``None`` where none is."""
        windows = [one.window for one in self._done if one.window.begin.phase <= phase <= one.window.end.phase]
        if not windows:
            return None
        return lambda epoch, batch_index: skipped(windows, Place(phase, epoch, batch_index))

    def leave(self, own: WardenError | None, numbers: NumberWatch, place: Place) -> tuple[WardenError, bool]:
        """The error with which all ranks leave, and whether they save before it. Collective; at least one has an error.

        All go back when everyone who has an error wants that and it is possible; else each leaves with its own error,
        or that of the lowest rank which has one.
        """
        mine = numbers.trouble if numbers.trouble is not None and numbers.trouble.error is own else None
        told = [one for one in self._ranks.gather((own, mine)) if one[0] is not None]
        error = own or told[0][0]
        assert error is not None
        spoiled = any(one is not None and one.spoiled for _, one in told)
        wished = [one for _, one in told if one is not None and one.first_step is not None]
        if len(wished) < len(told):
            return error, not spoiled
        back = self._ranks.lead(lambda: self._write(wished, numbers.trail, place))
        if isinstance(back, str):
            error.details["problem"] = "; ".join(filter(None, [str(error.details.get("problem") or ""), back]))
            return error, not spoiled
        error = RollbackNeededError(
            reason=back.reason,
            first_step=back.first_step,
            last_step=back.last_step,
            checkpoint_step=back.checkpoint_step,
            rollbacks=len(self._done) + 1,
            max_rollbacks=self._policy.max_rollbacks,
            learning_rate_factor=back.learning_rate_factor,
        )
        return error, False

    def _write(self, troubles: Sequence[Trouble], trail: Trail | None, place: Place) -> Rollback | str:
        """The return as it was written down, or why there is none. Called by rank 0."""
        refusal = self._policy.refusal(len(self._done))
        if refusal is not None:
            return refusal
        places = trail.places if trail else {}
        last_step = max(trouble.last_step for trouble in troubles)
        back = self._policy.plan(
            first_step=min(trouble.first_step for trouble in troubles if trouble.first_step is not None),
            last_step=last_step,
            places=places,
            end=places.get(last_step, place),
            checkpoints=rollbacks.checkpoint_steps(self._checkpoints),
            reason=troubles[0].reason,
        )
        if back is None:
            return "there is no checkpoint from before it"
        rollbacks.write(self._run_dir, [*self._done, back])
        rollbacks.drop_newer(self._checkpoints, back.checkpoint_step)
        return back


def _behind(checkpoint: Checkpoint) -> int:
    """How many returns the run had behind it when ``checkpoint`` was taken."""
    count: int = checkpoint.parts[GUARD_PART].get("rollbacks", 0)
    return count
