"""Real processes that run a function as the ranks of a gloo group; started once, used by many tests."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ENDS_THE_PROCESS = ("RestartNeededError", "ValueError")
"""Errors that one rank raises alone: the others notice when its process is gone."""

DEADLINE_S = 120.0
"""A rank that has not answered by then hangs: the test fails and the processes are replaced."""


@dataclass(frozen=True)
class Raised:
    """What a rank answers when its function raised."""

    kind: str
    code: str | None
    text: str
    details: Any = None


class HungError(AssertionError):
    """Some rank did not answer within the deadline."""


class RankPool:
    """``run`` calls a module-level function once in each of ``world_size`` processes."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], *, deadline_s: float = DEADLINE_S, **arguments: Any) -> list[Any]:
        """The answers by rank: what the function returned, `Raised`, or ``None`` for a rank that died.

        ``function(rank=, **arguments)`` finds the default process group initialised.
        """
        self._start_missing()
        with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
            store = Path(folder) / "store"
            for rank, (_, pipe) in enumerate(self._workers):
                pipe.send((function, rank, self.world_size, str(store), arguments))
            answers = self._answers(time.monotonic() + deadline_s)
        if any(answer is None or _ends_the_process(answer) for answer in answers):
            self.close()
        return answers

    def close(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers = []

    def _start_missing(self) -> None:
        if self._workers and all(process.is_alive() for process, _ in self._workers):
            return
        self.close()
        context = multiprocessing.get_context("spawn")
        for _ in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _answers(self, until_s: float) -> list[Any]:
        answers: dict[int, Any] = {}
        pending = {pipe: rank for rank, (_, pipe) in enumerate(self._workers)}
        while pending:
            ready = wait(list(pending), timeout=max(0.0, until_s - time.monotonic()))
            if not ready:
                self.close()
                raise HungError(f"ranks {sorted(pending.values())} gave no answer; the others: {answers}")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = pending.pop(pipe)
                try:
                    answers[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    answers[rank] = None
        return [answers[rank] for rank in range(self.world_size)]


def _ends_the_process(answer: Any) -> bool:
    return isinstance(answer, Raised) and answer.kind in ENDS_THE_PROCESS


def _serve(pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, rank, world_size, store, arguments = pipe.recv()
        except (EOFError, OSError):
            return
        answer = _call(function, rank, world_size, store, arguments)
        with suppress(BrokenPipeError):
            pipe.send(answer)
        if _ends_the_process(answer):
            os._exit(1)  # a script would end here, and with it its connections


def _call(function: Callable[..., Any], rank: int, world_size: int, store: str, arguments: dict[str, Any]) -> Any:
    import datetime

    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=DEADLINE_S / 2),
    )
    dist.barrier()  # a function that ends at once would close connections that another rank has still to make
    try:
        return function(rank=rank, **arguments)
    except Exception as error:  # noqa: BLE001 - the test wants to see it, whatever it is
        return Raised(type(error).__name__, getattr(error, "code", None), str(error), getattr(error, "details", None))
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group()
