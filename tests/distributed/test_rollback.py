"""Several ranks go back together, whichever of them saw the reason."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.distributed.pool import Raised, RankPool
from tests.distributed.rollback_loops import STEPS, Outcome, Plan, train

AT_STEP = 25
ONE_RANKS_SAMPLE = 8 * (AT_STEP - 1) + 1
"""Rank 1 reads the odd samples, four a step."""


@pytest.mark.parametrize("on_spike", [True, False], ids=["a spike", "a loss that is no number"])
def test_all_ranks_go_back_in_place_and_end_where_a_run_without_the_batch_ends(
    tmp_path: Path, two_ranks: RankPool, on_spike: bool
) -> None:
    bad = (ONE_RANKS_SAMPLE, 1e4 if on_spike else math.nan)
    found = two_ranks.run(train, plan=Plan(str(tmp_path / "a"), bad, on_spike=on_spike))
    expected = two_ranks.run(train, plan=Plan(str(tmp_path / "b"), leave_out=AT_STEP, on_spike=on_spike))
    for outcome, reference in zip(found, expected, strict=True):
        assert isinstance(outcome, Outcome), outcome
        assert isinstance(reference, Outcome), reference
        assert (outcome.came_back, outcome.rolled_back) == (1, [20])
        assert outcome.steps_completed == reference.steps_completed == STEPS
        assert torch.equal(outcome.weights, reference.weights)


def test_a_loop_that_ends_instead_ends_on_all_ranks_with_the_same_error_and_resumes(
    tmp_path: Path, two_ranks: RankPool
) -> None:
    plan = Plan(str(tmp_path / "a"), (ONE_RANKS_SAMPLE, 1e4), restart=True)
    first = two_ranks.run(train, plan=plan)
    assert all(isinstance(answer, Raised) for answer in first), first
    assert {answer.code for answer in first} == {"RUNTIME_ROLLBACK_NEEDED"}
    assert {answer.details["checkpoint_step"] for answer in first} == {20}
    again = two_ranks.run(train, plan=plan)
    expected = two_ranks.run(train, plan=replace(plan, run_dir=str(tmp_path / "b"), bad=None, leave_out=AT_STEP))
    for outcome, reference in zip(again, expected, strict=True):
        assert isinstance(outcome, Outcome), outcome
        assert torch.equal(outcome.weights, reference.weights)
