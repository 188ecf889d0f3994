"""kill -9 at any moment: the run continues to weights bit-identical to those of a run that was never touched.

A moment is the k-th call of a C function after training has begun (a tensor operation, a file operation, an fsync):
the whole run is counted once, then each round draws k. The seed is printed; ``WARDEN_KILL_SEED`` repeats a run.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from . import killed
from .warm import Ending, Start, cold, run

SCRIPT = Path(killed.__file__)


def weights_of(ending: Ending) -> list[float]:
    assert ending.status == 0, ending.err
    weights: list[float] = json.loads(ending.out)["weights"]
    return weights


@pytest.mark.parametrize("kills", [20, pytest.param(100, marks=pytest.mark.torture)])
def test_kills_at_random_moments_lose_nothing(tmp_path: Path, start: Start, kills: int) -> None:
    seed = int(os.environ.get("WARDEN_KILL_SEED", random.randrange(2**31)))
    print(f"WARDEN_KILL_SEED={seed}")
    drawn = random.Random(seed)
    whole = run(start, SCRIPT, tmp_path / "whole", 0)
    expected = weights_of(whole)
    calls = json.loads(whole.out)["calls"]

    for round_number in range(kills):
        run_dir = tmp_path / f"run{round_number}"
        moment = drawn.randint(1, calls)
        here = f"seed {seed}, round {round_number}: killed at call {moment} of {calls}"
        first = run(start, SCRIPT, run_dir, moment)
        assert first.status == -signal.SIGKILL, f"{here}, and it ended otherwise: {first.err}"
        if drawn.random() < 0.3:  # a run may be hit more than once
            again = run(start, SCRIPT, run_dir, drawn.randint(1, calls))
            assert again.status in (0, -signal.SIGKILL), f"{here}: {again.err}"
        resumed = run(start, SCRIPT, run_dir, 0)
        assert resumed.status == 0, f"{here}, no resume: {resumed.err}"
        assert weights_of(resumed) == expected, here
        shutil.rmtree(run_dir)


def test_a_warm_interpreter_trains_as_a_fresh_one(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is killed above is what a user starts."""
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parents[2]))
    assert weights_of(run(start, SCRIPT, tmp_path / "warm", 0)) == weights_of(run(cold, SCRIPT, tmp_path / "cold", 0))
