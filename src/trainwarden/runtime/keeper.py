"""When checkpoints are taken, what a failed one means, and which one a run continues from."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainwarden.checkpoint import Checkpoint, CheckpointStore
from trainwarden.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    DiskFullError,
    GPUMemoryError,
    InvalidSettingError,
    ResumeMismatchError,
    RunExistsError,
)
from trainwarden.events import CheckpointFailed, CheckpointRejected, CheckpointSaved, Event, Notice, Resumed
from trainwarden.runtime.phases import CHECKPOINT, attempt
from trainwarden.runtime.watched import differences

MAX_FAILURES_IN_A_ROW = 3
"""Periodic checkpoints that may fail (a full disk passes) before the failure ends the run."""


@dataclass(frozen=True)
class CheckpointPolicy:
    """A checkpoint is due after so many steps or seconds, whichever comes first; ``None`` switches a clock off."""

    every_steps: int | None = None
    every_s: float | None = 600.0
    keep_last: int = 2

    def __post_init__(self) -> None:
        steps, seconds = self.every_steps, self.every_s
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
            expected = "a whole number of at least 1, or None"
            raise InvalidSettingError(setting="checkpoint_every_steps", value=steps, expected=expected)
        if seconds is not None and not (isinstance(seconds, (int, float)) and seconds > 0):
            expected = "a positive number of seconds, or None"
            raise InvalidSettingError(setting="checkpoint_every_s", value=seconds, expected=expected)

    def due_by_steps(self, steps_since: int) -> bool:
        return self.every_steps is not None and steps_since >= self.every_steps

    def due_by_time(self, steps_since: int, seconds_since: float) -> bool:
        return self.every_s is not None and steps_since >= 1 and seconds_since >= self.every_s


class CheckpointKeeper:
    """Takes checkpoints of one run into ``directory`` and finds the one to continue from."""

    def __init__(
        self,
        directory: Path,
        policy: CheckpointPolicy,
        *,
        emit: Callable[[Event], None],
        clock: Callable[[], float],
    ) -> None:
        self.last_saved_step = 0
        self._store = CheckpointStore(directory, keep_last=policy.keep_last)
        self._directory = directory
        self._policy = policy
        self._emit = emit
        self._clock = clock
        self._last_try = (0, clock())
        self._failures = 0

    def find(self, resume: str) -> Checkpoint | None:
        """The newest valid checkpoint; rejected ones are announced.

        Raises `RunExistsError`, `CheckpointNotFoundError` when that does not go with ``resume``, `CheckpointError` when
        checkpoints are there and none is valid.
        """
        if resume == "never":
            if any(self._directory.glob("step-*")):
                raise RunExistsError(path=str(self._directory.parent))
            return None
        checkpoint = self._store.load_newest(on_rejected=self._announce_rejected)
        if checkpoint is None:
            if resume == "must":
                raise CheckpointNotFoundError(path=str(self._directory))
            return None
        self.note_save(checkpoint.step, saved=True)
        return checkpoint

    def load(self, path: Path) -> Checkpoint:
        """The checkpoint that another rank has found and verified. Raises `CheckpointError`."""
        checkpoint = self._store.load(path)
        self.note_save(checkpoint.step, saved=True)
        return checkpoint

    def check_fingerprint(self, saved: Mapping[str, Any], now: Mapping[str, Any], accepted: Sequence[str]) -> None:
        """Raises `ResumeMismatchError` with what differs, unless it is accepted.

        ``now`` tells either of the data or of what is watched; only keys of ``saved`` that tell of the same count.
        """
        data = any(map(_tells_of_data, now))
        relevant = {key: value for key, value in saved.items() if _tells_of_data(key) == data}
        found = differences(relevant, now, accepted)
        if found:
            raise ResumeMismatchError(differences=found)

    def announce_resume(self, checkpoint: Checkpoint, run_id: str, guard_state: Mapping[str, Any]) -> None:
        self._emit(
            Resumed(
                step=checkpoint.step,
                run_id=run_id,
                checkpoint_path=str(checkpoint.path),
                epoch=guard_state["position"]["epoch"],
                batch_index=guard_state["position"]["batch_index"],
            )
        )

    def due_by_steps(self, step: int) -> bool:
        """The same on every rank."""
        return self._policy.due_by_steps(step - self._last_try[0])

    def due_by_time(self, step: int) -> bool:
        """By this process's clock: ranks have to agree on it."""
        last_step, last_s = self._last_try
        return self._policy.due_by_time(step - last_step, self._clock() - last_s)

    def save(self, step: int, parts: Mapping[str, Any], meta: Mapping[str, Any], *, required: bool) -> Path | None:
        """Writes and verifies a checkpoint; ``None`` when it failed and need not succeed this time.

        Raises `DiskFullError`, `CheckpointError` or `GPUMemoryError` when ``required``, or after too many failures in
        a row. A lack of memory is a failure only if releasing some does not help.
        """
        began_s = time.perf_counter()

        def say(text: str) -> None:
            self._emit(Notice(step=step, text=text))

        try:
            path = attempt(CHECKPOINT, lambda: self._store.save(step, parts, meta), refusal=None, say=say, draws=False)
        except (DiskFullError, CheckpointError, GPUMemoryError) as error:
            self._failures += 1
            reason = str(error)
            self._emit(CheckpointFailed(step=step, code=error.code, reason=reason, failures=self._failures))
            if required or self._failures >= MAX_FAILURES_IN_A_ROW:
                raise
            return None
        finally:
            self.note_save(step, saved=False)
        self._failures = 0
        self.note_save(step, saved=True)
        self._emit(CheckpointSaved(step=step, path=str(path), save_s=time.perf_counter() - began_s))
        return path

    def note_save(self, step: int, *, saved: bool) -> None:
        """A checkpoint of this step was tried, here or by rank 0: the next one is due counting from it."""
        self._last_try = (step, self._clock())
        if saved:
            self.last_saved_step = step

    def _announce_rejected(self, path: Path, reason: str) -> None:
        self._emit(CheckpointRejected(step=0, path=str(path), reason=reason))


def _tells_of_data(key: str) -> bool:
    return key.split(".")[0].split("#")[0] in ("loader", "max_steps")
