"""FSDP2 under the guard: a rank that fails inside what all do together ends all, and the restart knows why."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.loops import Outcome, Plan, Strike, plain
from tests.distributed.pool import RankPool
from tests.distributed.sharded import train_sharded
from trainwarden.errors import RankLostError


def apart(found: list[float], expected: list[float]) -> float:
    a, b = np.asarray(found), np.asarray(expected)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_without_a_fault_it_trains_what_ddp_trains(two_ranks: RankPool, tmp_path: Path) -> None:
    plan = Plan(str(tmp_path), optimizer="sgd", scheduled=False)
    found = two_ranks.run(train_sharded, world_size=2, plan=plan)
    assert found[0].weights == found[1].weights
    assert apart(found[0].weights, two_ranks.run(plain, plan=plan)[0]) < 1e-6


@pytest.mark.parametrize(("phase", "layer"), [("forward", 2), ("backward", 2)])
def test_all_ranks_leave_and_the_restarted_run_goes_on_with_smaller_parts(
    two_ranks: RankPool, tmp_path: Path, phase: str, layer: int
) -> None:
    strike = Strike(1, step=4, phase=phase, layer=layer)  # type: ignore[arg-type]
    plan = Plan(f"{tmp_path}/struck", strikes=(strike,), guard_options={"checkpoint_every_steps": 2})
    other, failed = two_ranks.run(train_sharded, world_size=2, plan=plan)
    assert failed.code == "RUNTIME_RESTART_NEEDED"
    assert failed.details["micro_batch_size"] == 2
    assert other.code == "RUNTIME_RANK_LOST"
    resumed = two_ranks.run(train_sharded, world_size=2, plan=plan)
    assert all(isinstance(outcome, Outcome) for outcome in resumed), resumed
    assert [outcome.steps_completed for outcome in resumed] == [6, 6]
    undisturbed = two_ranks.run(train_sharded, world_size=2, plan=replace(plan, run_dir=f"{tmp_path}/not", strikes=()))
    assert apart(resumed[0].weights, undisturbed[0].weights) < 1e-5
    assert not list((tmp_path / "struck").glob("next_plan*"))


def test_an_interrupted_run_ends_bit_identically(two_ranks: RankPool, tmp_path: Path) -> None:
    plan = Plan(f"{tmp_path}/stopped", max_steps=3)
    two_ranks.run(train_sharded, world_size=2, plan=plan)
    longer = replace(plan, max_steps=6, guard_options={"accept_changes": ["max_steps"]})
    resumed = two_ranks.run(train_sharded, world_size=2, plan=longer)
    whole = two_ranks.run(train_sharded, world_size=2, plan=replace(longer, run_dir=f"{tmp_path}/whole"))
    assert [outcome.weights for outcome in resumed] == [outcome.weights for outcome in whole]


def test_ranks_with_different_numbers_of_parts_run_as_many_passes(two_ranks: RankPool, tmp_path: Path) -> None:
    """The last batch of an epoch is smaller on one rank, or all parts of a rank are: nobody waits for ever."""
    plan = Plan(f"{tmp_path}/limited", rows=22, max_steps=6, optimizer="sgd")
    Path(plan.run_dir).mkdir()
    (Path(plan.run_dir) / "next_plan.rank1.json").write_text('{"micro_batch_size": 3}')
    limited = two_ranks.run(train_sharded, world_size=2, plan=plan)
    assert all(isinstance(outcome, Outcome) for outcome in limited), limited
    whole = two_ranks.run(train_sharded, world_size=2, plan=replace(plan, run_dir=f"{tmp_path}/whole"))
    assert apart(limited[0].weights, whole[0].weights) < 1e-5


def test_a_rank_that_waits_for_one_that_failed_and_lives_on_leaves_with_the_typed_error(tmp_path: Path) -> None:
    """gloo cannot be interrupted, so the process ends; the group's own deadline is ten minutes here."""
    command = [sys.executable, "-m", "tests.distributed.stuck"]
    places = [f"{tmp_path}/store", f"{tmp_path}/run"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    waiting, failing = (
        subprocess.Popen([*command, str(rank), *places], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ)
        for rank in range(2)
    )
    try:
        _, said = waiting.communicate(timeout=120)
        assert waiting.returncode == RankLostError.exit_code
        assert b"rank 0 of 2 lost another rank: rank 1 ended with RUNTIME_RESTART_NEEDED" in said
        assert b"last good step  2" in said
        assert failing.poll() is None
    finally:
        failing.kill()
        waiting.kill()
        failing.communicate()
