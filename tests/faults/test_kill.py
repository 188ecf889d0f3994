"""kill -9 at any moment: the run continues to weights bit-identical to those of a run that was never touched.

A moment is the k-th call of a C function after training has begun (a tensor operation, a file operation, an fsync):
the whole run is counted once, then each round draws k. The seed is printed; ``WARDEN_KILL_SEED`` repeats a run.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

MAX_STEPS = 24

forkserver = multiprocessing.get_context("forkserver")


def train(run_dir: Path) -> torch.Tensor:
    from torch.utils.data import DataLoader

    from tests.runtime.loops import Loop, Rows

    loop = Loop(
        run_dir,
        max_steps=MAX_STEPS,
        dropout=0.2,
        loader=DataLoader(Rows(40, noise=True), batch_size=8, shuffle=True),
        guard_options={"checkpoint_every_steps": 2},
    )
    return loop.run().weights()


def train_until(run_dir: Path, result: Any, kill_at_call: int | None) -> None:
    """Child process: trains, killing itself at the given call; reports the number of calls and the weights."""
    torch.set_num_threads(1)
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        if event == "c_call":
            calls += 1
            if calls == kill_at_call:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    weights = train(run_dir)
    sys.setprofile(None)
    result.put((calls, weights.tolist()))


def in_child(target: Callable[..., None], *arguments: Any) -> tuple[int, Any]:
    """Exit code and result of a fresh process; it starts with torch already imported."""
    result = forkserver.Queue()
    process = forkserver.Process(target=target, args=(arguments[0], result, *arguments[1:]))
    process.start()
    value = None
    while value is None and process.is_alive():
        try:
            value = result.get(timeout=0.05)
        except Exception:  # noqa: BLE001 - queue.Empty, or the pipe of a killed writer
            continue
    process.join(60)
    if value is None and process.exitcode == 0:
        value = result.get(timeout=10)
    return process.exitcode or 0, value


@pytest.fixture(scope="module", autouse=True)
def preloaded() -> None:
    forkserver.set_forkserver_preload(["torch", "trainwarden.runtime", "tests.runtime.loops"])


@pytest.mark.parametrize("kills", [20, pytest.param(100, marks=pytest.mark.torture)])
def test_kills_at_random_moments_lose_nothing(tmp_path: Path, kills: int) -> None:
    seed = int(os.environ.get("WARDEN_KILL_SEED", random.randrange(2**31)))
    print(f"WARDEN_KILL_SEED={seed}")
    drawn = random.Random(seed)
    status, (calls, expected) = in_child(train_until, tmp_path / "whole", None)
    assert status == 0

    killed = 0
    for round_number in range(kills):
        run_dir = tmp_path / f"run{round_number}"
        moment = drawn.randint(1, calls)
        status, _ = in_child(train_until, run_dir, moment)
        assert status == -signal.SIGKILL, f"round {round_number}: not killed at call {moment} of {calls}"
        killed += 1
        again = drawn.random() < 0.3  # a run may be hit more than once
        if again:
            in_child(train_until, run_dir, drawn.randint(1, calls))
        status, value = in_child(train_until, run_dir, None)
        assert status == 0, f"seed {seed}, round {round_number}: killed at call {moment} of {calls}, no resume"
        assert value[1] == expected, f"seed {seed}, round {round_number}: killed at call {moment} of {calls}"
        shutil.rmtree(run_dir)
    assert killed == kills
