"""Ask something that may never answer, and go on after a deadline."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from .binding import call_in_flight
from .values import Unknown

T = TypeVar("T")


def answer_of(task: Callable[[], T]) -> T | Unknown:
    """What ``task`` returns, or `Unknown` with what it raised: a sensor's failure is no failure of the run."""
    try:
        return task()
    except Exception as error:  # noqa: BLE001 - boundary: drivers, bindings and sources of others raise anything
        return Unknown(f"{type(error).__name__}: {error}")


def within(deadline_s: float, task: Callable[[], T]) -> T | Unknown:
    """What ``task`` returns, or `Unknown` when it does not return within ``deadline_s`` seconds.

    The task runs on a thread of its own that is abandoned when it hangs (a blocked driver call cannot be
    stopped).
    """
    answers: list[T | Unknown] = []

    def run() -> None:
        answers.append(answer_of(task))

    thread = threading.Thread(target=run, name="trainwarden-ask", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        return Unknown(f"no thread for it: {error}")
    thread.join(deadline_s)
    if answers:
        return answers[0]
    call = call_in_flight(thread.ident or 0)
    return Unknown(f"{call[0] if call else 'the driver'} did not answer within {deadline_s:g} s")
