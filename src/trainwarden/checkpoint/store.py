"""`CheckpointStore`: the checkpoints of one run. Kill it anywhere: the newest verified state loads."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trainwarden.errors import CheckpointError, CheckpointNotFoundError, InvalidSettingError

from . import layout
from .codec import Tree, encode
from .durable import fsync_directory, refuse_if_full, save_errors, write_file
from .layout import Slot
from .manifest import FileRecord, Manifest
from .removal import remove_checkpoint, remove_temporary, sweep
from .retention import removable
from .tensorfile import file_bytes, serialise
from .verify import Checkpoint, load_checkpoint, verify_checkpoint

_SLACK_BYTES = 1 << 20  # manifest, directories, rounding to blocks

Signature = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True)
class _Part:
    """One part, ready to be written; the tensors are the live ones."""

    tensors: dict[str, Tensor]
    skeleton: bytes

    @property
    def size_bytes(self) -> int:
        return file_bytes(self.tensors) + len(self.skeleton)


class CheckpointStore:
    """The checkpoints in one directory, which belongs to one writing process; readers may come at any time.

    Nothing is removed but what a store wrote: other files survive wherever they lie.
    """

    def __init__(self, directory: Path, *, keep_last: int = 2) -> None:
        """`keep_last` verified checkpoints are kept. Touches nothing. Raises InvalidSettingError."""
        if keep_last < 1:
            raise InvalidSettingError(setting="keep_last", value=keep_last, expected="at least 1")
        self.directory = Path(directory)
        self.keep_last = keep_last
        self._verdicts: dict[Path, tuple[Signature, bool]] = {}  # with the state that the files had then

    def save(self, step: int, parts: Mapping[str, Tree], meta: Mapping[str, Any]) -> Path:
        """Write a checkpoint, verify it by reading it back, and only then drop what it makes superfluous.

        `parts` are state trees (see `codec`) by name; `meta` is JSON that can be read without them. Space
        for one checkpoint more than `keep_last` is needed. Returns the directory, which is on disk when this
        returns. After any error the earlier checkpoints are as they were and nothing new is left behind.

        Raises:
            DiskFullError: it does not fit; found out before anything is written, where the system tells.
            CheckpointError: something in `parts` cannot be stored, or the disk refused or garbled it.
            InvalidSettingError: `step` is negative.
        """
        step = operator.index(step)
        if step < 0:
            raise InvalidSettingError(setting="step", value=step, expected="at least 0")
        with save_errors(self.directory, needed_bytes=0):
            slot = layout.next_slot(step, layout.slots_in(self.directory))
        path = self.directory / slot.name
        encoded = {name: _encoded(name, tree, path) for name, tree in parts.items()}
        _check_meta(meta, path)
        needed_bytes = _SLACK_BYTES + sum(part.size_bytes for part in encoded.values())
        with save_errors(path, needed_bytes):
            self._make_room(needed_bytes)
            temporary = self.directory / layout.temporary_name(slot)
            try:
                _write(temporary, step, encoded, dict(meta))
                _verify_written(temporary, path)
                temporary.rename(path)
            except BaseException:  # an interrupt must not leave gigabytes behind either
                with suppress(OSError):
                    remove_temporary(temporary)
                raise
            fsync_directory(self.directory)
        self._remember(path, valid=True)
        self._retire(slot, tuple(parts))
        return path

    def verify(self, path: Path) -> Manifest:
        """Read every file of the checkpoint at `path` and compare it with the manifest, which is returned.

        Raises:
            CheckpointNotFoundError: there is no such directory.
            CheckpointError: it is damaged or incomplete; the problem is one sentence.
        """
        manifest = verify_checkpoint(Path(path))
        self._remember(Path(path), valid=True)
        return manifest

    def load(self, path: Path) -> Checkpoint:
        """The checkpoint at `path`; it is made of the very bytes that were verified. Raises as `verify`."""
        checkpoint = load_checkpoint(Path(path))
        self._remember(Path(path), valid=True)
        return checkpoint

    def load_newest(self, *, on_rejected: Callable[[Path, str], None]) -> Checkpoint | None:
        """The newest checkpoint that verifies, or None when there is none at all.

        `on_rejected` is called with the path and the reason (one sentence) of each newer one that does not.

        Raises:
            CheckpointError: there are checkpoints and none is valid; the problem names each.
        """
        rejected: dict[Path, str] = {}
        while True:
            slots = self._slots_to_load()
            checkpoint = self._first_valid(slots, rejected, on_rejected)
            if checkpoint is not None:
                return checkpoint
            if self._slots_to_load() == slots:  # else a save has put something newer there and removed these
                break
        if not rejected:
            return None
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in rejected.items())
        raise CheckpointError(operation="load", path=self.directory, problem=f"none is valid ({reasons})")

    def _slots_to_load(self) -> list[Slot]:
        with _load_errors(self.directory):
            return layout.slots_in(self.directory)

    def _first_valid(
        self, slots: list[Slot], rejected: dict[Path, str], on_rejected: Callable[[Path, str], None]
    ) -> Checkpoint | None:
        for slot in slots:
            path = self.directory / slot.name
            try:
                with _load_errors(path):
                    if layout.is_checkpoint(path):
                        return self.load(path)
            except (CheckpointError, CheckpointNotFoundError) as error:
                # A save may have removed it while it was read: then it is no checkpoint now, and not a bad
                # one either.
                if path not in rejected and _is_there(path):
                    rejected[path] = str(error.details.get("problem", error.message))
                    on_rejected(path, rejected[path])
        return None

    def _make_room(self, needed_bytes: int) -> None:
        made = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in made or [self.directory]:
            fsync_directory(path.parent)
        sweep(self.directory)
        refuse_if_full(self.directory, needed_bytes)

    def _remember(self, path: Path, *, valid: bool) -> None:
        self._verdicts[path.absolute()] = (_signature(path), valid)

    def _is_verified(self, slot: Slot) -> bool:
        path = self.directory / slot.name
        signature, valid = self._verdicts.get(path.absolute(), (None, False))
        if signature != _signature(path):
            try:
                self.verify(path)
                valid = True
            except (CheckpointError, CheckpointNotFoundError):
                valid = False
            self._remember(path, valid=valid)
        return valid

    def _retire(self, newest: Slot, parts: tuple[str, ...]) -> None:
        # The new checkpoint is safe whatever happens here; what cannot be removed now is tried again at the
        # next save.
        with suppress(OSError):
            for slot in removable(
                layout.slots_in(self.directory),
                newest=newest,
                keep_last=self.keep_last,
                is_verified=self._is_verified,
            ):
                path = self.directory / slot.name
                with suppress(OSError):
                    remove_checkpoint(path, parts)
                self._verdicts.pop(path.absolute(), None)


def _encoded(name: str, tree: Tree, path: Path) -> _Part:
    if not layout.is_part_name(name):
        raise CheckpointError(operation="save", path=path, problem=f"a part cannot be called {name!r}")
    tensors, skeleton = encode(tree, place=name, path=path)
    return _Part(tensors, json.dumps(skeleton, separators=(",", ":")).encode())


def _check_meta(meta: Mapping[str, Any], path: Path) -> None:
    try:
        json.dumps(dict(meta))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(operation="save", path=path, problem=f"meta is not JSON: {error}") from error


def _write(temporary: Path, step: int, parts: Mapping[str, _Part], meta: dict[str, Any]) -> None:
    remove_temporary(temporary)  # of an earlier life of this process id
    temporary.mkdir(exist_ok=True)
    files: dict[str, FileRecord] = {}
    for name, part in parts.items():
        tensors_file, skeleton_file = layout.part_files(name)
        files[tensors_file] = write_file(temporary / tensors_file, serialise(part.tensors))
        files[skeleton_file] = write_file(temporary / skeleton_file, [part.skeleton])
    manifest = Manifest.describe(step, files, tuple(parts), meta)
    unfinished = temporary / layout.MANIFEST_BEING_WRITTEN
    write_file(unfinished, [manifest.to_bytes()])
    unfinished.rename(temporary / layout.MANIFEST)
    fsync_directory(temporary)


def _verify_written(temporary: Path, path: Path) -> None:
    try:
        verify_checkpoint(temporary)
    except CheckpointError as error:
        problem = f"what was written does not read back ({error.problem})"
        raise CheckpointError(operation="save", path=path, problem=problem) from error


@contextmanager
def _load_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = error.strerror or str(error)
        raise CheckpointError(operation="load", path=path, problem=problem) from error


def _is_there(path: Path) -> bool:
    """Whether a checkpoint is at ``path``, readable or not; one may be removed at any moment."""
    try:
        return layout.is_checkpoint(path)
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _signature(path: Path) -> Signature:
    """What changes when a file in `path` does; empty for a directory that is gone."""
    with suppress(OSError), os.scandir(path) as files:
        return tuple(
            sorted((file.name, (about := file.stat()).st_ino, about.st_size, about.st_mtime_ns) for file in files)
        )
    return ()
