"""One process a run directory: an exclusive ``flock`` that the kernel releases when its holder dies."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import weakref
from pathlib import Path

from trainwarden.errors import RunLockedError

if sys.platform != "win32":
    import fcntl

# A file system that has no locks (some network mounts) must not keep anyone from training on it.
_NO_LOCKS_HERE = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class DirectoryLock:
    """The exclusive claim on a run directory, held until ``close()`` or the death of the process.

    Forked children (data loader workers) give up their inherited share of the lock at birth, so that a worker
    which outlives a killed parent does not keep the run locked.

    Attributes:
        problem: why nothing is locked although the directory was opened, where the file system or platform
            has no locks; ``None`` when the lock is held.

    Raises:
        RunLockedError: another live process, or this one, holds the lock.
        OSError: the lock file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem: str | None = None
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        # A directory that went out of use without close() (a notebook cell that failed) unlocks with its last
        # reference.
        self._finalizer = weakref.finalize(self, _close_quietly, self._fd)
        try:
            self._claim()
        except BaseException:
            self.close()
            raise
        _held.add(self)

    def close(self) -> None:
        """Release. Harmless when called twice, and in a forked child."""
        self._finalizer()

    def _claim(self) -> None:
        if sys.platform == "win32":
            self.problem = "this platform has no flock"
            return
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunLockedError(path=str(self.path.parent), pid=self._holder()) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                raise
            self.problem = f"the file system has no locks ({error.strerror})"
            return
        # The pid only serves the message of whoever comes second; a full disk must not undo the claim.
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def _holder(self) -> int | None:
        try:
            return int(os.pread(self._fd, 32, 0))
        except (OSError, ValueError):
            return None


def _close_quietly(fd: int) -> None:
    # Closing, unlike LOCK_UN, ends the lock only with the last process that shares the open file: safe after
    # a fork.
    with contextlib.suppress(OSError):
        os.close(fd)


_held: weakref.WeakSet[DirectoryLock] = weakref.WeakSet()


def _leave_locks_to_the_parent() -> None:
    for lock in list(_held):
        lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_locks_to_the_parent)
