"""Data that one rank cannot read: the ranks stay in step, and when it is too much they leave together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.distributed.bad_data import BadOutcome, BadPlan, train
from tests.distributed.pool import RankPool
from trainwarden import DataPolicy


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "errors.jsonl").read_text().splitlines()]


def test_a_rank_that_leaves_out_a_batch_takes_the_next_one_and_stays_in_step(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    # Rank r reads r, r + 2, …: sample 11 lies in the second batch of rank 1.
    found = two_ranks.run(train, plan=BadPlan(str(tmp_path), bad=(11,)))
    assert all(isinstance(outcome, BadOutcome) for outcome in found), found
    assert found[0].weights == found[1].weights
    assert [outcome.steps_completed for outcome in found] == [6, 6]
    assert found[0].samples == list(range(0, 48, 2))
    assert found[1].samples == [*range(1, 8, 2), *range(17, 56, 2)]
    assert [outcome.left_out for outcome in found] == [0, 1]
    (record,) = records(tmp_path)
    assert (record["rank"], record["what"], record["batch"], record["indices"]) == (1, "batch", 1, [9, 11, 13, 15])


def test_every_rank_reports_its_own_samples_into_one_file(two_ranks: RankPool, tmp_path: Path) -> None:
    found = two_ranks.run(train, plan=BadPlan(str(tmp_path), bad=(10, 11, 20), samples=True))
    assert found[0].weights == found[1].weights
    assert sorted((record["rank"], record["index"]) for record in records(tmp_path)) == [(0, 10), (0, 20), (1, 11)]
    assert found[0].samples == [index for index in range(0, 48, 2) if index not in (10, 20)]
    assert [outcome.left_out for outcome in found] == [2, 1]
    assert found[0].in_ledger == 3


def test_above_the_limit_all_ranks_leave_at_the_same_step_and_go_on_together(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    policy = DataPolicy(min_count=2)
    plan = BadPlan(f"{tmp_path}/run", bad=(11, 19), policy=policy)
    found = two_ranks.run(train, plan=plan)
    assert [answer.code for answer in found] == ["RUNTIME_DATALOADER_FAILED"] * 2
    assert found[0].details == found[1].details
    assert (found[0].details["rank"], found[0].details["batches_left_out"]) == (1, 2)
    allowed = replace(plan, policy=DataPolicy(max_share=0.5))
    resumed = two_ranks.run(train, plan=allowed)
    whole = two_ranks.run(train, plan=replace(allowed, run_dir=f"{tmp_path}/whole"))
    assert [outcome.weights for outcome in resumed] == [outcome.weights for outcome in whole]
    assert [outcome.left_out for outcome in resumed] == [outcome.left_out for outcome in whole] == [0, 2]
    assert len(records(tmp_path / "run")) == 2


def test_a_rank_that_has_no_further_batch_takes_the_others_with_it(two_ranks: RankPool, tmp_path: Path) -> None:
    plan = BadPlan(f"{tmp_path}/run", breaks_off=(1, 3), checkpoint_every_steps=2)
    found = two_ranks.run(train, plan=plan)
    assert [answer.code for answer in found] == ["RUNTIME_DATALOADER_FAILED"] * 2
    assert [answer.details["fault"] for answer in found] == ["stream"] * 2
    whole = two_ranks.run(train, plan=replace(plan, run_dir=f"{tmp_path}/whole", breaks_off=(1, 99)))
    resumed = two_ranks.run(train, plan=replace(plan, breaks_off=(1, 99)))
    assert [outcome.weights for outcome in resumed] == [outcome.weights for outcome in whole]


def test_a_rank_of_which_nothing_can_be_read_does_not_search_for_ever(two_ranks: RankPool, tmp_path: Path) -> None:
    plan = BadPlan(str(tmp_path), bad=tuple(range(1, 64, 2)), policy=DataPolicy(min_count=3))
    found = two_ranks.run(train, plan=plan)
    assert [answer.code for answer in found] == ["RUNTIME_DATALOADER_FAILED"] * 2
    assert len(records(tmp_path)) == 6
