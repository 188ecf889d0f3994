"""The directory of one run: who it is, who holds it, and where its parts lie."""

from __future__ import annotations

import dataclasses
import errno
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from trainwarden.errors import DiskFullError, InvalidSettingError, WardenError
from trainwarden.runs.lock import DirectoryLock
from trainwarden.runs.manifest import RunManifest

LOCK_NAME = ".warden.lock"
EVENTS_NAME = "events.jsonl"
CHECKPOINTS_NAME = "checkpoints"


class RunDirectory:
    """An opened run directory, locked against every other process until ``close()``.

    It may hold anything else besides: nothing in it is ever deleted, and files that are not a run's are left
    alone.
    """

    def __init__(
        self, path: Path, manifest: RunManifest, renewed: RunManifest, lock: DirectoryLock, *, reopened: bool
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.reopened = reopened
        """Whether a run lived here before."""
        self._renewed = renewed
        self._lock = lock

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        command: Sequence[str] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> RunDirectory:
        """Create a run in ``path``, or open the one that is there under its old ``run_id``.

        Opening changes nothing about a run that is there: a start may still be refused. `record_start` does.

        Args:
            path: the directory; parents are made.
            command: the command line that ``resume_command`` repeats; by default the one this process was
                given.
            config: the whole configuration (JSON-serialisable) if the run can be started again from it by
                ``warden resume``; ``None`` keeps what an earlier start left.

        Raises:
            RunLockedError: another live process holds the directory.
            ConfigurationError: its ``run.json`` is somebody else's or damaged; it is left as it is.
            InvalidSettingError: the directory cannot be made or written.
            DiskFullError: no space for it.
        """
        path = Path(path)
        command = list(_own_command() if command is None else command)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = DirectoryLock(path / LOCK_NAME)
        except OSError as error:
            raise _cannot_use(path, error) from error
        try:
            found = RunManifest.read(path)
            manifest = found or RunManifest.new(command, config)
            if found is None:
                manifest.write(path)
        except OSError as error:
            lock.close()
            raise _cannot_use(path, error) from error
        except BaseException:
            lock.close()
            raise
        return cls(path, manifest, _renewed(manifest, command, config), lock, reopened=found is not None)

    @property
    def run_id(self) -> str:
        return self.manifest.run_id

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS_NAME

    @property
    def events(self) -> Path:
        return self.path / EVENTS_NAME

    @property
    def resume_command(self) -> str:
        """The exact command that continues the run: ``warden resume PATH`` or the user's own command."""
        return self.manifest.resume_command(self.path)

    @property
    def lock_problem(self) -> str | None:
        """Why the directory is not locked (a file system without locks), ``None`` when it is."""
        return self._lock.problem

    def record_start(self) -> None:
        """From now on the present command and configuration are those of the run: they were accepted.

        Raises:
            InvalidSettingError, DiskFullError: ``run.json`` cannot be written.
        """
        if self._renewed == self.manifest:
            return
        try:
            self._renewed.write(self.path)
        except OSError as error:
            raise _cannot_use(self.path, error) from error
        self.manifest = self._renewed

    def close(self) -> None:
        """Let others open the directory. Harmless when called twice."""
        self._lock.close()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _own_command() -> list[str]:
    """The command line of this process as it was typed: a console script runs as ``python …/bin/warden``."""
    command = list(sys.orig_argv)
    if len(command) > 1 and Path(command[1]).name == "warden":
        return ["warden", *command[2:]]
    return command


def _renewed(found: RunManifest, command: Sequence[str], config: Mapping[str, Any] | None) -> RunManifest:
    """The old run as started once more: the command that last started it is the one that resumes it."""
    return dataclasses.replace(
        found, command=list(command), cwd=str(Path.cwd()), config=found.config if config is None else config
    )


def _cannot_use(path: Path, error: OSError) -> WardenError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(path=str(path), needed_bytes=4096, free_bytes=_free_bytes(path))
    reason = error.strerror or type(error).__name__
    return InvalidSettingError(
        setting="output_dir", value=str(path), expected=f"a directory that can be made and written ({reason})"
    )


def _free_bytes(path: Path) -> int | None:
    for place in (path, *path.absolute().parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return None
