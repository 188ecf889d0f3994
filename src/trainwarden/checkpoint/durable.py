"""The few operations that decide whether a checkpoint survives: write, sync, and how much room there is.

Everything in this room that changes the disk goes through the functions of `os` (pathlib calls them too),
one call an operation, so that tests can stop, fail or kill at each.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainwarden.errors import CheckpointError, DiskFullError, WardenError

from .manifest import FileRecord

_GATHER_BYTES = 1 << 20
"""Pieces below this size are written together: optimizers have thousands of one-element tensors."""
_WRITE_BYTES = 1 << 24


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a new file and wait until the disk has it. Returns what was meant to be there. Raises OSError."""
    digest, size_bytes = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for block in _gathered(pieces):
            digest.update(block)
            size_bytes += len(block)
            _write_all(descriptor, memoryview(block))
        os.fsync(descriptor)
        _drop_from_cache(descriptor)
    finally:
        os.close(descriptor)
    return FileRecord(size_bytes, digest.hexdigest())


def replace_file(path: Path, pieces: Iterable[bytes | memoryview]) -> FileRecord:
    """`write_file` in place of what is there, whole or not at all; the name is on the disk after `fsync_directory`.

    Raises OSError.
    """
    unfinished = path.with_name(unfinished_name(path.name))
    unfinished.unlink(missing_ok=True)  # of a process that was killed here
    record = write_file(unfinished, pieces)
    unfinished.rename(path)
    return record


def unfinished_name(name: str) -> str:
    """What a file is called until `replace_file` has all of it."""
    return f".{name}.tmp"


def fsync_directory(directory: Path) -> None:
    """Wait until the disk has the names in `directory`. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(directory: Path) -> int | None:
    """What a user may still write there; None where the file system does not say."""
    try:
        status = os.statvfs(directory)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize if status.f_blocks else None


def refuse_if_full(directory: Path, needed_bytes: int) -> None:
    """Raises DiskFullError when `needed_bytes` certainly do not fit."""
    free = free_bytes(directory)
    if free is not None and free < needed_bytes:
        raise DiskFullError(path=directory, needed_bytes=needed_bytes, free_bytes=free)


@contextmanager
def save_errors(path: Path, needed_bytes: int) -> Iterator[None]:
    """Turn the OSError of a failed write into the typed error that says what to do."""
    try:
        yield
    except OSError as error:
        raise _typed(error, path, needed_bytes) from error


def _typed(error: OSError, path: Path, needed_bytes: int) -> WardenError:
    if error.errno == errno.ENOSPC:
        return DiskFullError(path=path.parent, needed_bytes=needed_bytes, free_bytes=free_bytes(path.parent))
    if error.errno in (
        errno.EDQUOT,
        errno.EFBIG,
    ):  # a limit of the user's: what the disk has free is beside the point
        return DiskFullError(path=path.parent, needed_bytes=None, free_bytes=None)
    return CheckpointError(operation="save", path=path, problem=error.strerror or str(error))


def _drop_from_cache(descriptor: int) -> None:
    # Verification is to read what the disk holds, not what memory remembers having sent to it.
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _gathered(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    waiting = bytearray()
    for piece in pieces:
        if len(piece) < _GATHER_BYTES:
            waiting += piece
        if waiting and (len(waiting) >= _GATHER_BYTES or len(piece) >= _GATHER_BYTES):
            yield bytes(waiting)
            waiting.clear()
        if len(piece) >= _GATHER_BYTES:
            for start in range(0, len(piece), _WRITE_BYTES):
                yield piece[start : start + _WRITE_BYTES]
    if waiting:
        yield bytes(waiting)


def _write_all(descriptor: int, block: memoryview) -> None:
    written = 0
    while written < len(block):
        written += os.write(descriptor, block[written:])
