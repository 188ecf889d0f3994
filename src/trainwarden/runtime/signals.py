"""Stop requests: the first SIGINT or SIGTERM lets the step finish, the second one stops at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Handlers for SIGINT and SIGTERM between `install` and `remove`, which puts the previous ones back."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """Name of the signal that asked for a stop."""
        self._previous: dict[signal.Signals, Any] = {}
        self._owner_pid = os.getpid()

    def install(self) -> bool:
        """False off the main thread, where Python allows no handlers: signals are left alone."""
        if threading.current_thread() is not threading.main_thread():
            return False
        # A signal that the parent ignores (nohup, a background job) stays ignored.
        wanted = [number for number in _STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._handle) for number in wanted}
        return True

    def remove(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous = {}

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._owner_pid:
            self._handle_in_child(number)
        elif self.reason is None:
            self.reason = signal.Signals(number).name
            self._outlive_workers()
            # print() is not safe inside a handler: it may interrupt another print.
            os.write(2, f"\nwarden: {self.reason}: finishing the step; once more stops at once\n".encode())
        else:
            self.remove()
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            os.kill(os.getpid(), number)

    def _outlive_workers(self) -> None:
        """A scheduler's SIGTERM kills the data workers too, and torch would raise for that in mid-step."""
        if hasattr(signal, "SIGCHLD"):
            self._previous[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)

    def _handle_in_child(self, number: int) -> None:
        """A forked child inherits this handler: Ctrl-C is the parent's business, SIGTERM means what it always did."""
        if number == signal.SIGTERM:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
