"""One ``with guard.watch(...)``: resuming, the step boundary, and every way a run may end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from trainwarden.checkpoint import Checkpoint
from trainwarden.device import Sampler
from trainwarden.errors import (
    DataLoaderError,
    GPUMemoryError,
    InvalidSettingError,
    RankLostError,
    RestartNeededError,
    RollbackNeededError,
    TrainingAbortedError,
    WardenError,
)
from trainwarden.events import (
    Event,
    MemoryRemedyApplied,
    MicroBatchGrown,
    MicroBatchShrunk,
    OptimizerStepFinished,
    RunFinished,
    RunStarted,
    StepCompleted,
    StopRequested,
)
from trainwarden.guards.hardware import HardwareGuard
from trainwarden.guards.ladder import AnyRemedy
from trainwarden.runtime import next_plan
from trainwarden.runtime.backward import SplitBackward
from trainwarden.runtime.data_errors import DataErrors
from trainwarden.runtime.exchange import exchange_of
from trainwarden.runtime.hardware import HardwareWatch, attend, cuda_indices
from trainwarden.runtime.journal import FollowerJournal, RunJournal
from trainwarden.runtime.keeper import CheckpointKeeper
from trainwarden.runtime.lifeline import Lifeline
from trainwarden.runtime.numbers import NumberWatch, place_of
from trainwarden.runtime.phases import CHECKPOINT, attempt
from trainwarden.runtime.policies import Policies, Progress
from trainwarden.runtime.position import DataPosition, batches_an_epoch, describe_loader, rescaled
from trainwarden.runtime.ranks import Ranks, Wish, is_rank_failure, leave_together, rank_lost
from trainwarden.runtime.representation import Representation
from trainwarden.runtime.returns import Returns
from trainwarden.runtime.sharded import is_sharded
from trainwarden.runtime.signals import StopSignals
from trainwarden.runtime.steps import StepWatch
from trainwarden.runtime.watched import GUARD_PART, Watched

Ending = Literal["finished", "stopped", "failed"]

_NOTHING = Wish.NOTHING  # asking an enumeration for its member takes time, and this is asked every step
MAX_BATCHES_WITHOUT_STEP = 10_000
"""More batches than any accumulation window: the loop steps an optimizer that the guard does not watch."""


class Session:
    """Everything that exists only while one ``watch`` lasts, and what happens at its step boundaries."""

    def __init__(
        self,
        policies: Policies,
        progress: Progress,
        watched: Watched,
        journal: RunJournal | FollowerJournal,
        ranks: Ranks,
        *,
        emit: Callable[[Event], None],
        notice: Callable[[str], None],
        clock: Callable[[], float],
        sampler: Sampler | None,
        tell_steps: bool,
        representations: list[Representation],
        fingerprint: Mapping[str, Any] | None = None,
    ) -> None:
        self.policies = policies
        self.progress = progress
        self.watched = watched
        self.journal = journal
        self.ranks = ranks
        self._emit = emit
        self._notice = notice
        self._clock = clock
        self._tell_steps = tell_steps
        self.position: DataPosition | None = None
        self.batch_open = False
        self.stop = StopSignals()
        self.numbers = NumberWatch(policies.numbers, representations, emit=emit, count_skipped=progress.count_skipped)
        self.returns = Returns(policies.numbers.rollback, journal.path, journal.checkpoints, ranks)
        self.steps = StepWatch(
            watched,
            current_step=lambda: progress.steps_completed,
            recover=policies.oom.enabled,
            say=notice,
            on_finished=self._say_step_finished,
            leave_later=self.leave_later,
            detection=policies.numbers.finite.detection,
            values=self.numbers.values,
        )
        if self.steps.in_flight:
            self.numbers.remember_places()
        self.keeper = CheckpointKeeper(journal.checkpoints, policies.checkpoint, emit=emit, clock=clock)
        self.exchange = exchange_of(list(watched.models.values()), notice)
        lockstep = ranks.world_size > 1 and any(is_sharded(leaf) for leaf in watched.leaves())
        self.lifeline = Lifeline(ranks.rank, ranks.world_size, add_context=self._add_context) if lockstep else None
        self.backward = SplitBackward(
            policies.oom,
            progress.plan,
            models=list(watched.models.values()),
            leaves=watched.leaves,
            scale=watched.scaler.scale if watched.scaler is not None else lambda loss: loss,
            split=policies.split,
            verify=policies.verify_split and not lockstep,  # the check runs forward passes, on this rank alone
            on_shrink=self._say_shrink,
            on_grow=self._say_growth,
            on_remedy=self._say_remedy,
            remedies=policies.remedies,
            exchange=self.exchange,
            settle=self._settle,
            lockstep=ranks.largest if lockstep else None,
        )
        self.hardware = self._hardware_watch(sampler)
        self.data = DataErrors.of(policies.data, journal, ranks, step=lambda: progress.steps_completed, emit=emit)
        self.described = fingerprint or {**watched.fingerprint(), "world_size": ranks.world_size}
        """What decides the training besides data."""
        self._fingerprint: dict[str, Any] = dict(self.described)
        self._resume = "must" if fingerprint else policies.resume  # who has gone back in place continues
        self._saved_guard_state: Mapping[str, Any] | None = None
        self._phase = -1
        self._max_steps = 0
        self._finished = False
        self._batches_since_step = 0
        self._step_ended_s = self._clock()
        self._voted: Wish | None = None
        self._leaving: WardenError | None = None
        self._newest_shrink: MicroBatchShrunk | None = None

    def _hardware_watch(self, sampler: Sampler | None) -> HardwareWatch | None:
        """``None`` when nothing is to be watched: no policy, or no parameter on a GPU and no sampler given."""
        devices = cuda_indices(self.watched.leaves())
        if self.policies.hardware is None or not (devices or sampler):
            return None
        return HardwareWatch(
            HardwareGuard(self.policies.hardware, self._clock, devices=devices or None),
            sampler or Sampler(),
            emit=self._emit,
            shrink=self.backward.shrink_ahead,
        )

    # -- begin and end -------------------------------------------------------------------------------------------

    def begin(self) -> None:
        checkpoint = self._find_checkpoint()
        if checkpoint is None:
            self._emit(RunStarted(step=0, run_id=self.journal.run_id, run_dir=str(self.journal.path)))
        else:
            self._take_over(checkpoint)
        self.returns.begin(checkpoint, self.watched, self._emit)
        left = self.ranks.lead(lambda: next_plan.found(self.journal.path))
        if left is not None and left.teach(self.progress.plan):
            self._notice(f"micro-batches of {left.rows}: more did not fit in the last start")
        self.journal.begin()
        if self.exchange:
            self.exchange.install()
        if self.lifeline:
            self.lifeline.start()
        for text in self.steps.install():
            self._notice(text)
        if not self.stop.install():
            self._notice("not on the main thread: SIGINT, SIGTERM and the exit status are left alone")
        if self.hardware:
            self.hardware.start()

    def _find_checkpoint(self) -> Checkpoint | None:
        """The same on every rank: rank 0 looks for it, the others read what it found."""
        found: list[Checkpoint] = []

        def find() -> Path | None:
            checkpoint = self.returns.found(lambda: self.keeper.find(self._resume))
            if checkpoint is not None:
                found.append(checkpoint)
            return checkpoint.path if checkpoint else None

        path = self.ranks.lead(find)
        if found or path is None:
            return found[0] if found else None
        return self.keeper.load(path)

    def _take_over(self, checkpoint: Checkpoint) -> None:
        """Continue from ``checkpoint``, on all ranks or on none."""
        progress = self.progress
        saved = checkpoint.parts[GUARD_PART]
        error: WardenError | None = None
        try:
            self.keeper.check_fingerprint(saved["fingerprint"], self._fingerprint, self.policies.accept_changes)
            self.watched.load_state(checkpoint.parts, str(checkpoint.path))
        except WardenError as problem:
            error = problem
        error = leave_together(self.ranks, error)
        if error is not None:
            raise error
        progress.steps_completed = saved["steps_completed"]
        progress.steps_skipped = saved["steps_skipped"]
        progress.plan.load_state_dict(saved["plan"])
        self.numbers.load_state_dict(saved.get("numbers", {}))
        progress.newest_checkpoint = checkpoint.path
        self._saved_guard_state = saved
        self.keeper.announce_resume(checkpoint, self.journal.run_id, saved)

    def end(self) -> None:
        """The loop ended without an error: account for its last batch and save what is not saved yet."""
        try:
            if self.batch_open:
                self.close_batch()
            self._leaving = self._leaving or self._look_at_numbers(wait=True)
            agreed = self.ranks.vote(self._wishes(self.progress.steps_completed))
            if Wish.LEAVE in agreed:
                self._leave()
            if Wish.STOP in agreed and not self._finished:
                self._abort()
            self._save_if_new()
            self._close("finished" if self._finished else "stopped", None)
        finally:
            self._unhook()

    def fail(self, error: BaseException) -> None:
        self._unhook()
        if isinstance(error, RestartNeededError):
            lesson = self.progress.plan.lesson
            next_plan.leave(self.journal.path, self.ranks.rank, int(error.micro_batch_size), lesson)
        if self.lifeline and not isinstance(error, RankLostError):
            self.lifeline.tell(error)
        code = error.code if isinstance(error, WardenError) else type(error).__name__
        clean_stop = isinstance(error, (TrainingAbortedError, RollbackNeededError, KeyboardInterrupt))
        self._close("stopped" if clean_stop else "failed", code, error)
        if isinstance(error, WardenError):
            self._add_context(error)

    def lost(self, error: BaseException) -> RankLostError | None:
        """The typed error of a collective that failed, whoever called it; ``None`` for any other error."""
        if self.ranks.world_size == 1 or not is_rank_failure(error):
            return None
        lost = rank_lost(error, "collective")
        heard = self.lifeline.heard() if self.lifeline else None
        return RankLostError(rank=self.ranks.rank, world_size=self.ranks.world_size, problem=heard) if heard else lost

    def _add_context(self, error: WardenError) -> None:
        progress = self.progress
        error.add_context(
            run_id=self.journal.run_id,
            steps_completed=progress.steps_completed,
            checkpoint_path=str(progress.newest_checkpoint) if progress.newest_checkpoint else None,
            resume_command=self.journal.resume_command,
        )

    def _unhook(self) -> None:
        self.steps.remove()
        self.numbers.let_go()
        self.stop.remove()
        if self.exchange:
            self.exchange.remove()
        if self.lifeline:
            self.lifeline.close()
        if self.data:
            self.data.close()
        if self.hardware:
            self.hardware.close()

    def _close(
        self,
        status: Ending,
        code: str | None,
        error: BaseException | None = None,
    ) -> None:
        if not self.journal.begun:  # refused: the run that lives here is as it was
            self.journal.release()
            return
        progress = self.progress
        newest = str(progress.newest_checkpoint) if progress.newest_checkpoint else None
        self._emit(
            RunFinished(
                step=progress.steps_completed,
                status=status,
                steps_skipped=progress.steps_skipped,
                checkpoint_path=newest,
                code=code,
            )
        )
        self.journal.end(
            status,
            error,
            steps_completed=progress.steps_completed,
            steps_skipped=progress.steps_skipped,
            shrinks=progress.plan.shrinks,
            final_loss=self.steps.final_loss(),
            checkpoint_path=newest,
        )

    # -- data ----------------------------------------------------------------------------------------------------

    def enter_loader(self, loader: Iterable[Any], max_steps: int) -> DataPosition:
        """Called once for each ``batches``; loops that use several loaders in turn are told apart by their order."""
        self._phase += 1
        self._max_steps = max_steps
        self._finished = False
        self.position = DataPosition(loader, say=self._notice, errors=self.data)
        facts = {f"loader.{key}": value for key, value in describe_loader(loader).items()}
        facts["max_steps"] = max_steps
        named = facts if self._phase == 0 else {f"{key}#{self._phase}": value for key, value in facts.items()}
        saved = self._saved_guard_state
        if saved is not None and self._phase <= saved["phase"]:
            relevant = {key: value for key, value in saved["fingerprint"].items() if key in named}
            accepted = self.policies.accept_changes
            self.ranks.lead(lambda: self.keeper.check_fingerprint(relevant, named, accepted))
        self._fingerprint.update(named)
        if saved is not None and self._phase == saved["phase"]:
            self.position.load_state_dict(self._saved_position(saved))
        self._enter_data(self.position)
        return self.position

    def _enter_data(self, position: DataPosition) -> None:
        """Before the first batch of a loader."""
        step = self.progress.steps_completed
        position.leave_out = self.returns.leave_out(self._phase)
        if self.numbers.trail is not None:
            self.numbers.trail.note(step, place_of(position, self._phase))
        self.numbers.prepare(step + 1)
        if self.policies.numbers.may_go_back and self.progress.newest_checkpoint is None:
            self._save(required=True)  # there always is somewhere to go back to

    def skip_loader(self, position: DataPosition, max_steps: int) -> None:
        """All steps of this loader were done before the resume."""
        saved = self._saved_guard_state
        self._finished = True
        if saved is not None and self._phase == saved["phase"]:
            position.restore_streams(self._saved_position(saved))
            done = f"{self.progress.steps_completed} of {max_steps} steps"
            self._notice(f"run {self.journal.run_id} is finished ({done}): nothing left to do")

    def _saved_position(self, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        """This rank's own place in the data."""
        positions = saved["positions"]
        if len(positions) == self.ranks.world_size:
            position: Mapping[str, Any] = positions[self.ranks.rank]
            return position
        self._notice(
            f"saved by {len(positions)} ranks, continued by {self.ranks.world_size}: the order of samples changes"
        )
        assert self.position is not None
        return rescaled(positions[0], batches_an_epoch(self.position.loader))

    def next_batch(self, stream: Iterator[Any]) -> Any:
        try:
            batch = next(stream)
        except (RuntimeError, DataLoaderError) as error:
            if self.stop.reason is not None:
                # Inside an accumulation window the data workers may die of the same signal before the step is complete.
                raise TrainingAbortedError(reason=self.stop.reason) from error
            if isinstance(error, DataLoaderError):
                self._leave_between_steps(error)
            raise
        self.batch_open = True
        return batch

    def _leave_between_steps(self, error: DataLoaderError) -> None:
        """There is no next batch: save what was trained, or tell the ranks that wait in their gradient exchange."""
        if self.exchange:
            self.exchange.begin()
            self.exchange.finish(None)
            self._settle(False, error)
        elif self.ranks.world_size == 1:
            self._save_if_new()

    # -- the step boundary ---------------------------------------------------------------------------------------

    def close_batch(self) -> None:
        """Everything that may happen between two batches."""
        self.batch_open = False
        progress = self.progress
        if not self.steps.take_completed():
            self._count_batch_without_step()
            return
        batches, self._batches_since_step = self._batches_since_step + 1, 0
        progress.steps_completed += 1
        progress.plan.close_step()
        if self._tell_steps:
            self._tell_step()
        self._finished = progress.steps_completed >= self._max_steps
        # At the end nothing may still be on its way: what the loop does next is final.
        found = self._look_at_numbers(batches, wait=self._finished)
        self._leaving = self._leaving or found or (self.data.leaving if self.data else None)
        if self.hardware and not self._finished:
            self.hardware.look(progress.steps_completed)
        agreed = self._agreed()
        if agreed and Wish.LEAVE in agreed:
            self._leave()
        if not self.steps.gradient_pending:
            self._serve(agreed)

    def _agreed(self) -> Wish:
        """What all ranks want done at this boundary: as voted in this step's backward, else by a vote now."""
        voted, self._voted = self._voted, None
        return self.ranks.vote(self._wishes(self.progress.steps_completed)) if voted is None else voted

    def _wishes(self, step: int) -> Wish:
        """What this rank wants done after ``step``."""
        wishes = _NOTHING
        if self.stop.reason:
            wishes |= Wish.STOP
        if self.keeper.due_by_time(step):
            wishes |= Wish.SAVE
        if self.hardware and self.hardware.wants_attention:
            wishes |= Wish.ATTEND
        if self._leaving:
            wishes |= Wish.LEAVE
        return wishes

    def _serve(self, agreed: Wish) -> None:
        step = self.progress.steps_completed
        if not agreed:
            if self.keeper.due_by_steps(step):
                self._save(required=False)
            return
        if Wish.ATTEND in agreed and not self._finished:
            stopping = self._stopping
            attend(self.hardware, self.ranks, step=step, save=self._save_if_new, stopping=stopping)
            agreed |= Wish.STOP if self.ranks.vote(Wish.STOP if stopping() else Wish.NOTHING) else Wish.NOTHING
        if Wish.STOP in agreed and not self._finished:
            self._abort()
        if self.keeper.due_by_steps(step) or Wish.SAVE in agreed:
            self._save(required=False)

    def _stopping(self) -> bool:
        return self.stop.reason is not None

    def _settle(self, recovered: bool, error: WardenError | None) -> None:
        """The vote of a step, after the gradients were exchanged: all go on, or all leave with the same error."""
        wishes = self._wishes(self.progress.steps_completed + 1)
        if recovered:
            wishes |= Wish.RECOVERED
        if error is not None:
            wishes |= Wish.FAILED
        agreed = self.ranks.vote(wishes)
        if Wish.FAILED in agreed:
            failure = leave_together(self.ranks, error)
            assert failure is not None
            raise failure
        if Wish.RECOVERED in agreed:
            self._take_smallest_plan(recovered)
        self._voted = agreed if self._voted is None else self._voted | agreed

    def _take_smallest_plan(self, recovered: bool) -> None:
        """After memory ran out on some rank every rank knows what did not fit there, and tries no more."""
        plan = self.progress.plan
        found = self.ranks.gather((plan.lesson, self._newest_shrink) if recovered else (None, None))
        known = plan.bounds
        plan.learn([lesson for lesson, _ in found if lesson is not None])
        for rank, (_, shrink) in enumerate(found):
            if shrink is not None and rank != self.ranks.rank and plan.bounds != known:
                self._emit(replace(shrink, reason=f"rank {rank}: {shrink.reason}"))

    def leave_later(self, error: GPUMemoryError) -> bool:
        """Whether all ranks end with ``error`` at their next vote, so that this one goes on until then.

        Alone it cannot leave: the others have made the update that it has not, and wait for it in their next exchange.
        Its weights are not saved.
        """
        if self.exchange is None:
            return False
        self._leaving = self._leaving or error
        self.steps.spoiled = True
        return True

    def _tell_step(self) -> None:
        now_s = self._clock()
        step_s, self._step_ended_s = now_s - self._step_ended_s, now_s
        epoch = self.position.epoch if self.position else 0
        self._emit(StepCompleted(step=self.progress.steps_completed, epoch=epoch, step_s=step_s))

    def _count_batch_without_step(self) -> None:
        self._batches_since_step += 1
        if self._batches_since_step >= MAX_BATCHES_WITHOUT_STEP:
            raise InvalidSettingError(
                setting="watch(optimizer=)",
                value=", ".join(type(o).__name__ for o in self.watched.optimizers.values()),
                expected=f"the optimizer that the loop steps: it was not stepped in {self._batches_since_step} batches",
            )

    def _look_at_numbers(self, batches: int = 1, *, wait: bool = False) -> WardenError | None:
        """What ends the run, or makes it go back, after a step of so many ``batches``."""
        position, step = self.position, self.progress.steps_completed
        if position is None:
            return None
        return self.numbers.look(self.steps, step, position, self._phase, batches, wait=wait)

    def _leave(self) -> None:
        """All ranks save and end with the error of one of them."""
        assert self.position is not None
        place = place_of(self.position, self._phase)
        error, save = self.returns.leave(self._leaving, self.numbers, place)
        if save:
            self._save_if_new()
        raise error

    def _abort(self) -> None:
        reasons = self.ranks.gather(self.stop.reason)
        reason = self.stop.reason or next(reason for reason in reasons if reason)
        self._emit(StopRequested(step=self.progress.steps_completed, reason=reason))
        self._save_if_new()
        raise TrainingAbortedError(reason=reason)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _save_if_new(self) -> None:
        if self.position is None or self.progress.steps_completed <= self.keeper.last_saved_step:
            return
        if self.steps.gradient_pending:
            # The data position is ahead of the weights: its batches would be lost to the resumed run.
            self._notice("left inside an accumulation window: no checkpoint of the steps since the last one")
            return
        self._save(required=True)

    def _save(self, *, required: bool) -> None:
        assert self.position is not None
        progress = self.progress
        if self.policies.numbers.may_go_back and not self._leaving:
            # A checkpoint that holds what is still on its way to be seen would be no place to go back to.
            self._leaving = self._look_at_numbers(wait=True)
        bad = self.numbers.check_state(self.watched, progress.steps_completed)
        spoiled = self.numbers.trouble is not None and self.numbers.trouble.spoiled
        gathered = self.ranks.gather((self.position.state_dict(), self.steps.torn, spoiled, bad))
        if any(torn for _, torn, _, _ in gathered):
            self._notice("an optimizer step is half applied: the weights are not saved")
            return
        if any(spoiled for _, _, spoiled, _ in gathered):
            return  # the next boundary says why
        failure = bad or next((bad for *_, bad in gathered if bad is not None), None)
        if failure is not None:
            raise failure
        positions = [position for position, *_ in gathered]
        state = {
            "steps_completed": progress.steps_completed,
            "steps_skipped": progress.steps_skipped,
            "plan": progress.plan.state_dict(),
            "phase": self._phase,
            "position": positions[0],
            "positions": positions,
            "fingerprint": self._fingerprint,
            "numbers": self.numbers.state_dict(),
            "rollbacks": self.returns.count,
        }
        together = "every rank takes part in gathering a state" if self.lifeline else None
        told = attempt(CHECKPOINT, self.watched.state, refusal=together, say=self._notice, draws=False)
        parts = {**told, GUARD_PART: state}
        step, meta = progress.steps_completed, {"run_id": self.journal.run_id}
        path = self.ranks.lead(lambda: self.keeper.save(step, parts, meta, required=required))
        self.keeper.note_save(step, saved=path is not None)
        progress.newest_checkpoint = path or progress.newest_checkpoint
        if path is not None and self.ranks.rank == 0:
            next_plan.clear(self.journal.path)

    def _say_growth(self, from_size: int, to_size: int, reason: str) -> None:
        step = self.progress.steps_completed
        self._emit(MicroBatchGrown(step=step, from_size=from_size, to_size=to_size, reason=reason))

    def _say_remedy(self, remedy: AnyRemedy, reason: str) -> None:
        self._emit(MemoryRemedyApplied(step=self.progress.steps_completed, remedy=remedy, reason=reason))

    def _say_step_finished(self, parts: int, reason: str) -> None:
        self._emit(OptimizerStepFinished(step=self.progress.steps_completed, parts=parts, reason=reason))

    def _say_shrink(self, from_size: int, to_size: int, reason: str) -> None:
        step = self.progress.steps_completed
        self._newest_shrink = MicroBatchShrunk(step=step, from_size=from_size, to_size=to_size, reason=reason)
        self._emit(self._newest_shrink)
