"""The run as others see it: its locked directory, its event log and its row in the ledger."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from trainwarden.errors import WardenError, exit_status
from trainwarden.events import Observer
from trainwarden.runs import EventLog, Ledger, RunDirectory

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
            self._ledger.finished(
                self.run_id,
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


def _exit_code(error: BaseException | None) -> int:
    if error is None:
        return 0
    if isinstance(error, WardenError):
        return exit_status(error)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else EXIT_FOREIGN_ERROR
    return EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_FOREIGN_ERROR
