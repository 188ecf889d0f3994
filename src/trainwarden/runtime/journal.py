"""The run as others see it: its locked directory, its event log and its row in the ledger."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from trainwarden.errors import WardenError, exit_status
from trainwarden.events import Observer
from trainwarden.runs import EventLog, Ledger, RunDirectory
from trainwarden.runs.error_log import ERRORS_NAME, read_errors
from trainwarden.runtime.ranks import Ranks

EXIT_INTERRUPTED = 130
EXIT_FOREIGN_ERROR = 1


class RunJournal:
    """Opened for the time of one ``watch``; nothing in it is written from the step path.

    Raises what `RunDirectory.open` raises; trouble with the ledger is said through ``notice`` and otherwise ignored.
    """

    def __init__(
        self,
        run_dir: Path,
        command: Sequence[str] | None,
        config: Mapping[str, Any] | None,
        *,
        model: str,
        notice: Callable[[str], None],
    ) -> None:
        self._directory = RunDirectory.open(run_dir, command=command, config=config)
        self._log = EventLog(self._directory.events, run_id=self._directory.run_id)
        self._ledger = Ledger.open_or_none(notice)
        self._model = model
        self.begun = False
        """Whether the run was accepted; before that the ledger and the stored command stay as they are."""
        if self._directory.lock_problem:
            notice(f"the run directory is not locked against a second process: {self._directory.lock_problem}")

    @property
    def run_id(self) -> str:
        return self._directory.run_id

    @property
    def path(self) -> Path:
        return self._directory.path

    @property
    def checkpoints(self) -> Path:
        return self._directory.checkpoints.absolute()

    @property
    def resume_command(self) -> str:
        return self._directory.resume_command

    @property
    def observers(self) -> tuple[Observer, ...]:
        return (self._log,)

    def begin(self) -> None:
        """The run was not refused: from here on it is this process's."""
        self._directory.record_start()
        self.begun = True
        if self._ledger:
            self._ledger.started(
                run_id=self.run_id,
                path=self._directory.path,
                command=self._directory.manifest.command,
                model=self._model,
            )

    def end(
        self,
        status: Literal["finished", "stopped", "failed"],
        error: BaseException | None,
        **figures: Any,
    ) -> None:
        """Closes everything. ``figures``: steps_completed, steps_skipped, shrinks, final_loss, checkpoint_path."""
        if self._ledger:
            left_out = read_errors(self._directory.path / ERRORS_NAME)
            self._ledger.finished(
                self.run_id,
                data_skipped=sum(1 for _ in left_out),
                status=status,
                exit_code=_exit_code(error),
                code=error.code if isinstance(error, WardenError) else None,
                **figures,
            )
        self.release()

    def release(self) -> None:
        """Closes log and directory without a word about how the run ended."""
        self._log.close()
        self._directory.close()


class FollowerJournal:
    """The journal of a rank other than 0: it knows the run and writes nothing."""

    observers: tuple[Observer, ...] = ()

    def __init__(self, run_id: str, path: Path, checkpoints: Path, resume_command: str) -> None:
        self.run_id = run_id
        self.path = path
        self.checkpoints = checkpoints
        self.resume_command = resume_command
        self.begun = False

    def begin(self) -> None:
        self.begun = True

    def end(
        self, status: Literal["finished", "stopped", "failed"], error: BaseException | None, **figures: Any
    ) -> None:
        """Rank 0 keeps the record."""

    def release(self) -> None:
        """Nothing is held."""


def open_journal(
    ranks: Ranks,
    run_dir: Path,
    command: Sequence[str] | None,
    config: Mapping[str, Any] | None,
    *,
    model: str,
    notice: Callable[[str], None],
) -> RunJournal | FollowerJournal:
    """The journal of this rank: rank 0 opens and locks the directory, the others hear which run it is.

    Raises, on every rank, what `RunDirectory.open` raises on rank 0.
    """
    opened: list[RunJournal] = []

    def open_here() -> tuple[str, Path, Path, str]:
        journal = RunJournal(run_dir, command, config, model=model, notice=notice)
        opened.append(journal)
        return journal.run_id, journal.path, journal.checkpoints, journal.resume_command

    facts = ranks.lead(open_here)
    return opened[0] if opened else FollowerJournal(*facts)


def _exit_code(error: BaseException | None) -> int:
    if error is None:
        return 0
    if isinstance(error, WardenError):
        return exit_status(error)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else EXIT_FOREIGN_ERROR
    return EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_FOREIGN_ERROR
