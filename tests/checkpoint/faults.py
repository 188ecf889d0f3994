"""Stop, fail or record a save at each of its operations on the disk."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

OPERATIONS = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir")
Instead = Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]


@contextmanager
def operations(instead: Instead) -> Iterator[None]:
    """Call `instead(name, real_function, arguments)` for each of `OPERATIONS` but those it makes itself.

    What other threads do, of this test or left over from another one, is not counted.
    """
    inside, thread = False, threading.get_ident()

    def replacement(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def operation(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside or threading.get_ident() != thread:
                return real(*args, **kwargs)
            inside = True
            try:
                return instead(name, lambda *given: real(*given, **kwargs), args)
            finally:
                inside = False

        return operation

    patches = [mock.patch.object(os, name, replacement(name)) for name in OPERATIONS]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def count(action: Callable[[], object]) -> int:
    """How many operations `action` makes."""
    names: list[str] = []

    def note(name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        names.append(name)
        return real(*arguments)

    with operations(note):
        action()
    return len(names)


def killed_at(position: int, action: Callable[[], object]) -> bool:
    """Run `action` in a forked child that SIGKILLs itself at an operation; whether it came to that.

    A write gets half of its bytes to the file first: that is how a torn file looks.
    """
    seen = 0

    def kill(name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        nonlocal seen
        seen += 1
        if seen == position:
            if name == "write":
                descriptor, content = arguments
                real(descriptor, content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    def child() -> None:
        with operations(kill):
            action()

    status = in_child(child)
    assert status in (0, -signal.SIGKILL)
    return status != 0


def in_child(action: Callable[[], object]) -> int:
    """Run `action` in a forked child. The exit status: 0, 1 for an exception, or minus the fatal signal."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException:  # noqa: BLE001 - boundary: nothing may unwind into the parent's test run
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def failing_at(position: int, number: int) -> Instead:
    """Let one operation fail with that `errno`."""
    seen = 0

    def fail(name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        nonlocal seen
        seen += 1
        if seen == position:
            raise OSError(number, os.strerror(number))
        return real(*arguments)

    return fail
