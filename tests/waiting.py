"""Waiting for what another thread or process does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

LIMIT_S = 300.0
"""After this something counts as hung. Nothing waits so long when all is well, on however busy a machine."""

T = TypeVar("T")


def until(condition: Callable[[], T]) -> T:
    """What ``condition`` returns as soon as it is true."""
    end_s = time.monotonic() + LIMIT_S
    while not (found := condition()):
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.002)
    return found


@contextmanager
def ended_when_hung(end: Callable[[], object]) -> Iterator[None]:
    """Call ``end`` when the block, which waits for something that ``end`` would end, lasts longer than `LIMIT_S`."""
    timer = threading.Timer(LIMIT_S, end)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
