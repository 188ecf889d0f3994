"""`SlaoStore`: the accumulator on disk. Every merge is a new snapshot; none is ever changed. Kill it anywhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainwarden.checkpoint import CheckpointStore
from trainwarden.checkpoint.layout import Slot, slots_in
from trainwarden.errors import (
    AdapterNotFoundError,
    CheckpointError,
    CheckpointNotFoundError,
    SLAOCheckpointError,
    SLAOError,
)
from trainwarden.runs.lock import DirectoryLock

from . import export
from .records import Kept, Record, Snapshot, meta_of, now, parts_of, snapshot_of

if TYPE_CHECKING:
    from .transaction import Proposal

SNAPSHOTS = "snapshots"
LOCK_FILE = ".lock"

OnRejected = Callable[[Path, str], None]


class SlaoStore:
    """A directory with the accumulator's snapshots, and the newest as an adapter that plain peft loads.

    One process writes at a time (a file lock); readers may come at any time.
    """

    def __init__(self, path: str | Path, *, keep_last: int = 5, on_rejected: OnRejected | None = None) -> None:
        """Touches nothing.

        Args:
            keep_last: how many snapshots are kept to go back to.
            on_rejected: called with the path and the reason of each snapshot that is found damaged and passed
                over. By default a Python warning.

        Raises InvalidSettingError when `keep_last` is below 1.
        """
        self.path = Path(path)
        self._checkpoints = CheckpointStore(self.path / SNAPSHOTS, keep_last=keep_last)
        self._on_rejected = on_rejected or _warn
        self._lock: DirectoryLock | None = None

    def exists(self) -> bool:
        """Whether merging has written this directory."""
        return export.is_ours(self.path)

    def current(self) -> Snapshot | None:
        """The newest snapshot that verifies, or None when there is none at all.

        Raises SLAOCheckpointError when there are snapshots and none is valid.
        """
        with _errors():
            checkpoint = self._checkpoints.load_newest(on_rejected=self._on_rejected)
        return None if checkpoint is None else snapshot_of(checkpoint)

    def at(self, sequence: int) -> Snapshot:
        """The snapshot of that number.

        Raises AdapterNotFoundError when there is no history here, and SLAOCheckpointError when the snapshot is
        damaged, retired, or was never there.
        """
        self._require()
        path = self._checkpoints.directory / Slot(sequence).name
        try:
            with _errors():
                checkpoint = self._checkpoints.load(path)
        except CheckpointNotFoundError as error:
            problem = "there is no snapshot of that number, or it was retired"
            raise SLAOCheckpointError(operation="load", path=path, problem=problem) from error
        return snapshot_of(checkpoint)

    def history(self) -> list[Record]:
        """What was merged, oldest first, each with whether its snapshot can still be gone back to.

        Records travel in every snapshot, so they outlive the snapshots that were retired. Reads and verifies
        them all. Raises AdapterNotFoundError when there is no history here, and SLAOCheckpointError.
        """
        self._require()
        current = self.current()
        if current is None:
            return []
        on_disk = {slot.step for slot in slots_in(self._checkpoints.directory)}
        return [
            replace(record, kept=self._kept(record.sequence, current.sequence, on_disk)) for record in current.history
        ]

    def commit(self, proposal: Proposal, *, exported: bool = True) -> Snapshot:
        """Write what was proposed: a snapshot, verified by reading it back, and then the exported adapter.

        When this returns both are on disk. Killed at any point, the accumulator is the old one or the new one,
        whole; an export that was not reached is made up for by `export` or the next commit.

        Args:
            exported: False leaves the export to a later call, in the middle of a chain of merges.

        Raises:
            SLAOError: something else was committed since the proposal was made.
            RunLockedError: another process is writing.
            SLAOCheckpointError, DiskFullError: it could not be written; the accumulator is as it was.
            InvalidSettingError: the directory holds something that merging did not write.
        """
        with self.writing():
            head = self._head()
            if head != proposal.parent:
                problem = f"snapshot {head} was committed meanwhile, and this merge started from {proposal.parent}"
                raise SLAOError(problem=problem)
            return self._save(proposal.preview(), exported=exported)

    def rollback(self, to: int) -> Snapshot:
        """Go back to snapshot ``to``: it becomes the newest one again, under a new number, and is exported.

        Nothing is removed, so a rollback can be rolled back. Raises as `at` and `commit`.
        """
        self._require()
        with self.writing():
            target, current = self.at(to), self.current()
            record = replace(target.history[-1], action="rollback", source=f"snapshot {to}", created_at=now())
            history = (*(current or target).history, record)
            return self._save(replace(target, history=history), exported=True)

    def export(self) -> bool:
        """Bring the exported adapter to the newest snapshot, after a kill between the two. Whether it was needed.

        Raises DiskFullError, SLAOCheckpointError and RunLockedError.
        """
        current = self.current()
        if current is None or export.exported_sequence(self.path) == current.sequence:
            return False
        with self.writing(), _errors():
            export.export(self.path, current)
        return True

    @property
    def exported_sequence(self) -> int | None:
        """The number of the snapshot that is exported; None while there is no complete export."""
        return export.exported_sequence(self.path)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the directory for several writes in a row. Raises as `commit`."""
        if self._lock is not None:
            yield
            return
        with _errors(), _io_errors(self.path):
            export.claim(self.path)
            self._lock = DirectoryLock(self.path / LOCK_FILE)
        try:
            yield
        finally:
            self._lock.close()
            self._lock = None

    def _save(self, snapshot: Snapshot, *, exported: bool) -> Snapshot:
        """Store a snapshot under the next free number; its last record is of itself."""
        sequence = 1 + max((slot.step for slot in slots_in(self._checkpoints.directory)), default=0)
        *earlier, record = snapshot.history
        snapshot = replace(snapshot, sequence=sequence, history=(*earlier, replace(record, sequence=sequence)))
        with _errors():
            path = self._checkpoints.save(sequence, parts_of(snapshot), meta_of(snapshot))
            saved = replace(snapshot, path=path)
            if exported:
                export.export(self.path, saved)
        return saved

    def _require(self) -> None:
        if not self.exists():
            problem = "it is not the output of a merge" if self.path.exists() else "there is no such directory"
            raise AdapterNotFoundError(what="merge history", path=self.path, problem=problem)

    def _head(self) -> int:
        current = self.current()
        return current.sequence if current else 0

    def _kept(self, sequence: int, current: int, on_disk: set[int]) -> Kept:
        if sequence == current:
            return "current"
        if sequence not in on_disk:
            return "retired"
        try:
            self._checkpoints.verify(self._checkpoints.directory / Slot(sequence).name)
        except (CheckpointError, CheckpointNotFoundError):
            return "damaged"
        return "kept"


def _warn(path: Path, reason: str) -> None:
    warnings.warn(f"the snapshot {path} is damaged and was passed over: {reason}", stacklevel=2)


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except SLAOCheckpointError:
        raise
    except CheckpointError as error:
        details: dict[str, Any] = error.details
        raise SLAOCheckpointError(
            operation=details["operation"], path=details["path"], problem=details["problem"]
        ) from error


@contextmanager
def _io_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = error.strerror or str(error)
        raise SLAOCheckpointError(operation="save", path=path, problem=problem) from error
