"""The signal of a dead worker is kept until a batch is asked for, and gets through to whoever waits for one."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.waiting import LIMIT_S, ended_when_hung
from trainwarden.runtime.worker_deaths import WorkerDeaths, death_of_worker, dismiss_workers


@pytest.fixture
def deaths() -> Iterator[WorkerDeaths]:
    """Installed in front of a handler that raises, as torch's does while a dead worker is registered."""

    def torchs_handler(*_: Any) -> None:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    before = signal.signal(signal.SIGCHLD, torchs_handler)
    deaths = WorkerDeaths()
    deaths.fetching = frozenset({fetch.__code__})
    deaths.install()
    yield deaths
    deaths.remove()
    assert signal.getsignal(signal.SIGCHLD) is torchs_handler
    signal.signal(signal.SIGCHLD, before)


def fetch(before_waiting: Any) -> None:
    """Asks for a batch that a dead worker was to send, and would wait for ever."""
    before_waiting()
    with ended_when_hung(lambda: os.kill(os.getpid(), signal.SIGINT)):
        threading.Event().wait(LIMIT_S * 2)


def die() -> None:
    signal.raise_signal(signal.SIGCHLD)


def test_outside_fetching_a_death_is_only_noted(deaths: WorkerDeaths) -> None:
    die()
    assert "is killed by signal" in str(deaths.noted)


def test_whoever_waits_for_a_batch_is_told(deaths: WorkerDeaths) -> None:
    dying = threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, signal.SIGCHLD))
    with pytest.raises(RuntimeError, match="is killed by signal"):
        fetch(dying.start)
    assert deaths.noted is not None


def test_a_signal_that_comes_where_an_error_would_be_lost_is_not_lost(deaths: WorkerDeaths) -> None:
    """Python drops what is raised inside a finaliser or a callback of the garbage collector."""
    called = []

    def in_a_collection(phase: str, _info: Any) -> None:
        if phase == "start" and not called:
            called.append(phase)
            die()

    gc.callbacks.append(in_a_collection)
    try:
        with pytest.raises(RuntimeError, match="is killed by signal"):
            fetch(gc.collect)
    finally:
        gc.callbacks.remove(in_a_collection)
    assert called


def test_a_second_install_changes_nothing(deaths: WorkerDeaths) -> None:
    deaths.install()
    die()
    assert deaths.noted is not None


def test_without_a_handler_of_torchs_nothing_is_done() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        deaths = WorkerDeaths()
        deaths.install()
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
        deaths.remove()
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_handler_set_later_by_somebody_else_stays() -> None:
    before = signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        deaths = WorkerDeaths()
        deaths.install()

        def somebody_elses(*_: Any) -> None: ...

        signal.signal(signal.SIGCHLD, somebody_elses)
        deaths.remove()
        assert signal.getsignal(signal.SIGCHLD) is somebody_elses
    finally:
        signal.signal(signal.SIGCHLD, before)


def exits(status: int) -> None:
    os._exit(status)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("target", "arguments", "said"),
    [(killed, (), "is killed by signal: 9"), (exits, (3,), "exited unexpectedly")],
    ids=["killed", "exited"],
)
def test_a_broken_connection_is_put_down_to_the_worker_that_died(target: Any, arguments: Any, said: str) -> None:
    worker = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    worker.start()
    iterator = SimpleNamespace(_workers=[worker])
    death = death_of_worker(ConnectionResetError("Connection reset by peer"), iterator)
    assert str(death) == f"DataLoader worker (pid {worker.pid}) {said}"


def test_an_error_that_breaks_no_connection_is_not() -> None:
    assert death_of_worker(ValueError("no more weights"), SimpleNamespace(_workers=None)) is None
    assert death_of_worker(EOFError(), SimpleNamespace()) is None  # no worker processes


def waits(pipe: Any) -> None:
    pipe.recv()


def test_workers_that_hang_are_ended_and_not_waited_for() -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    worker = context.Process(target=waits, args=(theirs,))
    worker.start()
    shut_down = []
    iterator = SimpleNamespace(_workers=[worker], _shutdown_workers=lambda: shut_down.append(True))
    dismiss_workers(iterator, broken=True)
    worker.join(LIMIT_S)
    assert worker.exitcode == -signal.SIGTERM
    assert shut_down == [True]
    ours.close()
