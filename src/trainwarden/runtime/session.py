"""One ``with guard.watch(...)``: resuming, the step boundary, and every way a run may end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trainwarden.device import Sampler
from trainwarden.errors import InvalidSettingError, NaNLossError, TrainingAbortedError, WardenError
from trainwarden.events import (
    Event,
    MicroBatchShrunk,
    RunFinished,
    RunStarted,
    StepCompleted,
    StepSkipped,
    StopRequested,
)
from trainwarden.guards.finite import FinitePolicy
from trainwarden.guards.hardware import HardwareGuard, HardwarePolicies
from trainwarden.guards.oom import OOMPolicy
from trainwarden.runtime.backward import MicroBatchPlan, SplitBackward
from trainwarden.runtime.hardware import HardwareWatch, cuda_indices
from trainwarden.runtime.journal import RunJournal
from trainwarden.runtime.keeper import CheckpointKeeper, CheckpointPolicy
from trainwarden.runtime.position import DataPosition, describe_loader
from trainwarden.runtime.signals import StopSignals
from trainwarden.runtime.split import Split
from trainwarden.runtime.steps import StepWatch
from trainwarden.runtime.watched import GUARD_PART, Watched

Resume = Literal["auto", "never", "must"]
Ending = Literal["finished", "stopped", "failed"]

MAX_BATCHES_WITHOUT_STEP = 10_000
"""More batches than any accumulation window: the loop steps an optimizer that the guard does not watch."""


@dataclass(frozen=True)
class Policies:
    """What a guard was asked to do."""

    oom: OOMPolicy
    finite: FinitePolicy
    checkpoint: CheckpointPolicy
    resume: Resume
    accept_changes: tuple[str, ...]
    split: Split | None
    verify_split: bool
    save_frozen: bool
    hardware: HardwarePolicies | None


@dataclass
class Progress:
    """How far a run is. ``streak`` counts the bad steps in a row of this process."""

    steps_completed: int = 0
    steps_skipped: int = 0
    streak: int = 0
    newest_checkpoint: Path | None = None
    plan: MicroBatchPlan = field(default_factory=MicroBatchPlan)


class Session:
    """Everything that exists only while one ``watch`` lasts, and what happens at its step boundaries."""

    def __init__(
        self,
        policies: Policies,
        progress: Progress,
        watched: Watched,
        journal: RunJournal,
        *,
        emit: Callable[[Event], None],
        notice: Callable[[str], None],
        clock: Callable[[], float],
        sampler: Sampler | None,
        tell_steps: bool,
    ) -> None:
        self.policies = policies
        self.progress = progress
        self.watched = watched
        self.journal = journal
        self._emit = emit
        self._notice = notice
        self._clock = clock
        self._tell_steps = tell_steps
        self.position: DataPosition | None = None
        self.batch_open = False
        self.stop = StopSignals()
        self.steps = StepWatch(watched, current_step=lambda: progress.steps_completed)
        self.keeper = CheckpointKeeper(journal.checkpoints, policies.checkpoint, emit=emit, clock=clock)
        self.backward = SplitBackward(
            policies.oom,
            progress.plan,
            models=list(watched.models.values()),
            leaves=watched.leaves,
            scale=watched.scaler.scale if watched.scaler is not None else lambda loss: loss,
            split=policies.split,
            verify=policies.verify_split,
            on_shrink=self._say_shrink,
        )
        self.hardware = self._hardware_watch(sampler)
        self._fingerprint: dict[str, Any] = watched.fingerprint()
        self._saved_guard_state: Mapping[str, Any] | None = None
        self._phase = -1
        self._max_steps = 0
        self._finished = False
        self._batches_since_step = 0
        self._step_ended_s = self._clock()

    def _hardware_watch(self, sampler: Sampler | None) -> HardwareWatch | None:
        """``None`` when nothing is to be watched: no policy, or no parameter on a GPU and no sampler given."""
        devices = cuda_indices(self.watched.leaves())
        if self.policies.hardware is None or not (devices or sampler):
            return None
        return HardwareWatch(
            HardwareGuard(self.policies.hardware, self._clock, devices=devices or None),
            sampler or Sampler(),
            emit=self._emit,
            save=self._save_if_new,
            shrink=self.backward.shrink_ahead,
            stopping=lambda: self.stop.reason is not None,
        )

    # -- begin and end -------------------------------------------------------------------------------------------

    def begin(self) -> None:
        progress = self.progress
        checkpoint = self.keeper.find(self.policies.resume)
        if checkpoint is None:
            self._emit(RunStarted(step=0, run_id=self.journal.run_id, run_dir=str(self.journal.path)))
        else:
            saved = checkpoint.parts[GUARD_PART]
            self.keeper.check_fingerprint(saved["fingerprint"], self._fingerprint, self.policies.accept_changes)
            self.watched.load_state(checkpoint.parts, str(checkpoint.path))
            progress.steps_completed = saved["steps_completed"]
            progress.steps_skipped = saved["steps_skipped"]
            progress.plan.load_state_dict(saved["plan"])
            progress.newest_checkpoint = checkpoint.path
            self._saved_guard_state = saved
            self.keeper.announce_resume(checkpoint, self.journal.run_id, saved)
        self.journal.begin()
        for text in self.steps.install():
            self._notice(text)
        if not self.stop.install():
            self._notice("not on the main thread: SIGINT, SIGTERM and the exit status are left alone")
        if self.hardware:
            self.hardware.start()

    def end(self) -> None:
        """The loop ended without an error: account for its last batch and save what is not saved yet."""
        try:
            if self.batch_open:
                self.close_batch()
            self._find_bad_steps(wait=True)
            if self.stop.reason and not self._finished:
                self._abort()
            self._save_if_new()
            self._close("finished" if self._finished else "stopped", None)
        finally:
            self._unhook()

    def fail(self, error: BaseException) -> None:
        progress = self.progress
        self._unhook()
        code = error.code if isinstance(error, WardenError) else type(error).__name__
        clean_stop = isinstance(error, (TrainingAbortedError, KeyboardInterrupt))
        self._close("stopped" if clean_stop else "failed", code, error)
        if isinstance(error, WardenError):
            error.add_context(
                run_id=self.journal.run_id,
                steps_completed=progress.steps_completed,
                checkpoint_path=str(progress.newest_checkpoint) if progress.newest_checkpoint else None,
                resume_command=self.journal.resume_command,
            )

    def _unhook(self) -> None:
        self.steps.remove()
        self.stop.remove()
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
        self.position = DataPosition(loader, say=self._notice)
        facts = {f"loader.{key}": value for key, value in describe_loader(loader).items()}
        facts["max_steps"] = max_steps
        named = facts if self._phase == 0 else {f"{key}#{self._phase}": value for key, value in facts.items()}
        saved = self._saved_guard_state
        if saved is not None and self._phase <= saved["phase"]:
            relevant = {key: value for key, value in saved["fingerprint"].items() if key in named}
            self.keeper.check_fingerprint(relevant, named, self.policies.accept_changes)
        self._fingerprint.update(named)
        if saved is not None and self._phase == saved["phase"]:
            self.position.load_state_dict(saved["position"])
        return self.position

    def skip_loader(self, position: DataPosition, max_steps: int) -> None:
        """All steps of this loader were done before the resume."""
        saved = self._saved_guard_state
        self._finished = True
        if saved is not None and self._phase == saved["phase"]:
            position.restore_streams(saved["position"])
            done = f"{self.progress.steps_completed} of {max_steps} steps"
            self._notice(f"run {self.journal.run_id} is finished ({done}): nothing left to do")

    def next_batch(self, stream: Iterator[Any]) -> Any:
        try:
            batch = next(stream)
        except RuntimeError as error:
            if self.stop.reason is None:
                raise
            # Inside an accumulation window the data workers may die of the same signal before the step is complete.
            raise TrainingAbortedError(reason=self.stop.reason) from error
        self.batch_open = True
        return batch

    # -- the step boundary ---------------------------------------------------------------------------------------

    def close_batch(self) -> None:
        """Everything that may happen between two batches."""
        self.batch_open = False
        progress = self.progress
        if not self.steps.take_completed():
            self._count_batch_without_step()
            return
        self._batches_since_step = 0
        progress.steps_completed += 1
        progress.plan.shrinks_this_step = 0
        if self._tell_steps:
            self._tell_step()
        self._find_bad_steps()
        assert self.position is not None
        self._finished = progress.steps_completed >= self._max_steps
        if not self.steps.gradient_pending:
            if self.hardware and not self._finished:
                self.hardware.attend(progress.steps_completed)
            if self.stop.reason and not self._finished:
                self._abort()
            if self.keeper.due(progress.steps_completed):
                self._save(required=False)

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

    def _find_bad_steps(self, *, wait: bool = False) -> None:
        progress, policy = self.progress, self.policies.finite
        for step, findings in self.steps.poll(wait=wait):
            progress.streak = policy.next_streak(progress.streak, findings)
            if findings.what is None:
                continue
            progress.steps_skipped += 1
            self._emit(StepSkipped(step=step, what=findings.what, streak=progress.streak))
            if policy.exhausted(progress.streak):
                self._save_if_new()
                raise NaNLossError(streak=progress.streak, skipped=progress.steps_skipped, what=findings.what)

    def _abort(self) -> None:
        progress = self.progress
        assert self.stop.reason is not None
        self._emit(StopRequested(step=progress.steps_completed, reason=self.stop.reason))
        self._save_if_new()
        raise TrainingAbortedError(reason=self.stop.reason)

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
        state = {
            "steps_completed": progress.steps_completed,
            "steps_skipped": progress.steps_skipped,
            "plan": progress.plan.state_dict(),
            "phase": self._phase,
            "position": self.position.state_dict(),
            "fingerprint": self._fingerprint,
        }
        parts = {**self.watched.state(), GUARD_PART: state}
        path = self.keeper.save(progress.steps_completed, parts, {"run_id": self.journal.run_id}, required=required)
        progress.newest_checkpoint = path or progress.newest_checkpoint

    def _say_shrink(self, from_size: int, to_size: int, reason: str) -> None:
        step = self.progress.steps_completed
        self._emit(MicroBatchShrunk(step=step, from_size=from_size, to_size=to_size, reason=reason))
