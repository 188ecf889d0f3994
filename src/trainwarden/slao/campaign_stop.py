"""SIGINT and SIGTERM in a campaign: what is being done comes to its end, and then the campaign stops."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from trainwarden.errors import TrainingAbortedError
from trainwarden.events import Event, StepCompleted
from trainwarden.runtime.signals import StopSignals


class StopRequests:
    """Listens between and around trainings. In a training its guard does, which checkpoints at the next step."""

    def __init__(self) -> None:
        self._signals = StopSignals()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """The first signal is noted, a second one stops at once. Afterwards handlers are as they were before."""
        self._signals = StopSignals()
        self._signals.install()
        try:
            yield
        finally:
            self._signals.remove()

    def require_none(self) -> None:
        """Raises TrainingAbortedError when a stop was asked for."""
        if self._signals.reason is not None:
            raise TrainingAbortedError(reason=self._signals.reason)

    def hand_over(self, event: Event) -> None:
        """An observer of a training: a stop that was asked for while it was being prepared reaches its guard.

        With the first step that is completed the guard's own handlers are certainly in place.
        """
        if self._signals.reason is not None and isinstance(event, StepCompleted):
            reason, self._signals.reason = self._signals.reason, None
            os.kill(os.getpid(), signal.Signals[reason])
