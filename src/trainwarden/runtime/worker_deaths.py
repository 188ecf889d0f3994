"""A data worker that dies is reported between two steps, not in the middle of one.

torch learns of a dead worker process by SIGCHLD and raises from the signal's handler, wherever the main thread happens
to be: in a backward pass, in the middle of an optimizer step, while a checkpoint is written. The weights may then be
half updated. So outside the place where batches are asked for the error is only noted; it is raised when the next batch
is asked for.
"""

from __future__ import annotations

import multiprocessing.connection
import os
import queue
import selectors
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

import torch

AGAIN_AFTER_S = 0.1
"""Until the handler looks once more whether its error can be raised."""

GONE_WITHIN_S = 2.0
"""From the first connection that breaks until the process of a worker is gone."""


def _source(module: ModuleType) -> str:
    """Where the code of a module or package lies."""
    path = Path(module.__file__ or "")
    return str(path.parent if path.name == "__init__.py" else path)


_WAITING = tuple(map(_source, (torch, multiprocessing, queue, selectors, threading)))
"""Where the main thread is while it waits for a batch."""


class WorkerDeaths:
    """Stands before torch's handler of SIGCHLD between `install` and `remove`.

    Attributes:
        noted: what torch raised, once it has.
        fetching: the functions inside which torch's error may be raised at once.
    """

    def __init__(self) -> None:
        self.noted: RuntimeError | None = None
        self.fetching: frozenset[CodeType] = frozenset()
        self._inner: Callable[[int, FrameType | None], Any] | None = None
        self._owner_pid = os.getpid()

    def install(self) -> None:
        """Once torch has set its handler, as it does when it first starts workers; elsewhere nothing is done."""
        if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
            return
        present = signal.getsignal(signal.SIGCHLD)
        if not callable(present) or present == self._handle:
            return
        self._inner = present
        signal.signal(signal.SIGCHLD, self._handle)

    def remove(self) -> None:
        if self._inner is not None and signal.getsignal(signal.SIGCHLD) == self._handle:
            signal.signal(signal.SIGCHLD, self._inner)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        assert self._inner is not None
        if os.getpid() != self._owner_pid:  # a forked worker has inherited the handler
            self._inner(number, frame)
            return
        try:
            self._inner(number, frame)
        except RuntimeError as error:
            self.noted = error
        if self.noted is None or not self._is_fetching(frame):
            return
        if frame is not None and frame.f_code.co_filename.startswith(_WAITING):
            raise self.noted
        # In a finaliser, or a callback of the garbage collector, what is raised is dropped: once more, a little later.
        again = threading.Timer(AGAIN_AFTER_S, signal.pthread_kill, (threading.main_thread().ident, number))
        again.daemon = True
        again.start()

    def _is_fetching(self, frame: FrameType | None) -> bool:
        while frame is not None:
            if frame.f_code in self.fetching:
                return True
            frame = frame.f_back
        return False


def dismiss_workers(iterator: Any, *, broken: bool) -> None:
    """Ends the worker processes of a loader's ``iterator``; where one died or hangs the others are not waited for.

    An error holds the iterator in a circle of references, and torch's own way out takes five seconds a worker when the
    garbage collector comes by it.
    """
    if broken:
        for worker in getattr(iterator, "_workers", ()):
            worker.terminate()
    shut_down = getattr(iterator, "_shutdown_workers", None)
    if callable(shut_down):
        shut_down()


def death_of_worker(error: Exception, iterator: Any) -> RuntimeError | None:
    """What torch would say of a worker process of ``iterator`` that is dying or dead; ``None`` when all live.

    Its connections break before its process is gone, so ``error`` may be one of those.
    """
    if not isinstance(error, OSError | EOFError | RuntimeError):
        return None
    workers = [worker for worker in getattr(iterator, "_workers", ()) if hasattr(worker, "sentinel")]
    gone = multiprocessing.connection.wait([worker.sentinel for worker in workers], GONE_WITHIN_S) if workers else []
    for worker in workers:
        if worker.sentinel in gone:
            worker.join(GONE_WITHIN_S)
            how = f"is killed by signal: {-worker.exitcode}" if (worker.exitcode or 0) < 0 else "exited unexpectedly"
            return RuntimeError(f"DataLoader worker (pid {worker.pid}) {how}")
    return None
