"""DDP under the guard: the gradients are those of DDP, whatever runs out of memory on whichever rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.loops import Outcome, Plan, Strike, plain, train, train_lengths
from tests.distributed.pool import RankPool
from trainwarden.runs import RunDirectory


def apart(found: Outcome, expected: list[float]) -> float:
    """Relative distance of all parameters concatenated, in float64."""
    a, b = np.asarray(found.weights), np.asarray(expected)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("unused", [False, True])
def test_without_a_fault_the_weights_are_those_of_plain_ddp(
    two_ranks: RankPool, tmp_path: Path, accumulate: int, unused: bool
) -> None:
    plan = Plan(str(tmp_path), accumulate=accumulate, unused=unused)
    expected = two_ranks.run(plain, plan=plan)
    found = two_ranks.run(train, plan=plan)
    assert expected[0] == expected[1]
    assert [outcome.weights for outcome in found] == expected


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("phase", "layer"), [("forward", 0), ("forward", 2), ("backward", 1), ("backward", 3)])
@pytest.mark.parametrize("rank", [0, 1])
def test_memory_that_runs_out_on_one_rank_changes_no_weight(
    two_ranks: RankPool, tmp_path: Path, accumulate: int, phase: str, layer: int, rank: int
) -> None:
    strike = Strike(rank, step=3, phase=phase, layer=layer)  # type: ignore[arg-type]
    plan = Plan(str(tmp_path), accumulate=accumulate, strikes=(strike,))
    expected = two_ranks.run(plain, plan=plan)[0]
    found = two_ranks.run(train, plan=plan)
    assert all(isinstance(outcome, Outcome) for outcome in found), found
    assert found[0].weights == found[1].weights
    assert apart(found[0], expected) < 1e-5
    assert found[rank].shrunk[0][:2] == (4, 2)
    assert found[1 - rank].shrunk[0][:2] == (4, 2)
    assert found[1 - rank].shrunk[0][2].startswith(f"rank {rank}: out of memory in {phase}")
    undisturbed = two_ranks.run(train, plan=replace(plan, run_dir=f"{tmp_path}/undisturbed", strikes=()))
    assert [outcome.samples for outcome in found] == [outcome.samples for outcome in undisturbed]


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_parts_that_do_not_fit_either_after_gradients_were_sent_lose_nothing(
    two_ranks: RankPool, tmp_path: Path, layer: int
) -> None:
    """The whole batch fails with some buckets on their way, then its first half, before it has reached anything new."""
    plan = Plan(str(tmp_path), strikes=(Strike(1, step=1, phase="backward", layer=layer, rows=1),))
    found = two_ranks.run(train, plan=plan)
    assert [outcome.shrunk[-1][:2] for outcome in found] == [(2, 1), (2, 1)]
    assert apart(found[0], two_ranks.run(plain, plan=plan)[0]) < 1e-5
    assert found[0].weights == found[1].weights


def test_memory_may_run_out_on_all_ranks_at_once_and_again_and_again(two_ranks: RankPool, tmp_path: Path) -> None:
    strikes = (
        Strike(0, step=2, phase="backward", layer=2, rows=2),
        Strike(1, step=2, phase="forward", layer=1, rows=2),
        Strike(1, step=4, phase="backward", layer=1, rows=1),
    )
    plan = Plan(str(tmp_path), strikes=strikes)
    found = two_ranks.run(train, plan=plan)
    assert apart(found[0], two_ranks.run(plain, plan=plan)[0]) < 1e-5
    assert found[0].weights == found[1].weights
    assert [outcome.shrunk[-1][1] for outcome in found] == [1, 1]


def test_a_launcher_that_starts_one_process_changes_nothing(one_rank: RankPool, tmp_path: Path) -> None:
    """DDP's reducer would refuse every pass after the one that failed."""
    plan = Plan(str(tmp_path), accumulate=2, strikes=(Strike(0, step=3, phase="backward", layer=2),))
    (found,) = one_rank.run(train, plan=plan)
    assert found.shrunk
    assert apart(found, one_rank.run(plain, plan=plan)[0]) < 1e-5


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_when_one_rank_cannot_go_on_all_leave_with_its_error(two_ranks: RankPool, tmp_path: Path, phase: str) -> None:
    strike = Strike(1, step=3, phase=phase, layer=2, rows=0)  # type: ignore[arg-type]
    found = two_ranks.run(train, plan=Plan(str(tmp_path), strikes=(strike,)))
    assert [(answer.kind, answer.code) for answer in found] == [("GPUMemoryError", "RUNTIME_GPU_OOM")] * 2
    assert found[0].details == found[1].details
    assert found[0].details["phase"] == phase


def test_a_failure_before_the_call_in_which_the_ranks_meet_ends_all_of_them_alike(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    plan = Plan(str(tmp_path), accumulate=2, strikes=(Strike(1, step=3, phase="forward", rows=0),))
    found = two_ranks.run(train, plan=plan)
    assert [(answer.kind, answer.code) for answer in found] == [("GPUMemoryError", "RUNTIME_GPU_OOM")] * 2
    assert found[0].details == found[1].details


@pytest.mark.parametrize("step", [3, 6])
@pytest.mark.parametrize("phase", ["clip", "optimizer step"])
def test_an_update_that_one_rank_cannot_make_ends_all_ranks_alike_and_is_never_saved(
    two_ranks: RankPool, tmp_path: Path, phase: str, step: int
) -> None:
    """Step 6 is the last one: no backward pass follows in which the ranks would meet."""
    strike = Strike(1, step=step, phase=phase, layer=1, fatal=True)  # type: ignore[arg-type]
    plan = Plan(f"{tmp_path}/run", strikes=(strike,), max_norm=0.5, guard_options={"checkpoint_every_steps": 1})
    found = two_ranks.run(train, plan=plan)
    assert [(answer.kind, answer.code) for answer in found] == [("GPUMemoryError", "RUNTIME_GPU_OOM")] * 2
    assert found[0].details == found[1].details
    saved = {path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")}
    assert saved == {f"step-{step - 2:08}", f"step-{step - 1:08}"}
    resumed = two_ranks.run(train, plan=replace(plan, strikes=()))
    whole = two_ranks.run(train, plan=replace(plan, run_dir=f"{tmp_path}/whole", strikes=()))
    assert [outcome.weights for outcome in resumed] == [outcome.weights for outcome in whole]


def test_a_split_that_is_refused_on_one_rank_ends_all(two_ranks: RankPool, tmp_path: Path) -> None:
    plan = Plan(str(tmp_path), strikes=(Strike(0, step=2, phase="forward"),), normalised=True)
    found = two_ranks.run(train, plan=plan)
    assert [answer.code for answer in found] == ["RUNTIME_SPLIT_REFUSED"] * 2


def test_statistics_of_batches_are_rank_0s_as_under_ddp(two_ranks: RankPool, tmp_path: Path) -> None:
    plan = Plan(str(tmp_path), normalised=True)
    assert [outcome.weights for outcome in two_ranks.run(train, plan=plan)] == two_ranks.run(plain, plan=plan)


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_on_all(two_ranks: RankPool, tmp_path: Path) -> None:
    found = two_ranks.run(train, plan=Plan(str(tmp_path), poison=((1, 3),)))
    assert found[0].weights == found[1].weights
    assert np.isfinite(found[0].weights).all()
    assert [outcome.skipped for outcome in found] == [[3], [3]]
    assert np.isfinite(found[0].losses).all()  # rank 0's own loss was finite, and is reported as it was
    assert np.isnan(found[1].losses[2])


def test_with_accumulation_one_bad_loss_skips_one_step(two_ranks: RankPool, tmp_path: Path) -> None:
    found = two_ranks.run(train, plan=Plan(str(tmp_path), accumulate=2, poison=((1, 3),)))
    assert [outcome.skipped for outcome in found] == [[3], [3]]
    assert found[0].weights == found[1].weights


def test_what_fails_on_one_rank_is_not_tried_on_another_and_shorter_rows_are_not_shrunk(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    """Rank 0 lacks memory above 40 tokens. Rank 1 never does; it learns that, and splits by tokens, not by rows."""
    found = two_ranks.run(train_lengths, run_dir=str(tmp_path), lengths=((16, 4, 4), (4, 16, 4)), most_tokens=40)
    assert found[0]["weights"] == found[1]["weights"]
    assert found[0]["parts"] == [[2, 2], [4], [4]]
    assert found[1]["parts"] == [[4], [2, 2], [4]]
    assert found[1]["thrown"] == 0


def test_a_streak_of_them_ends_all_ranks_after_a_checkpoint(two_ranks: RankPool, tmp_path: Path) -> None:
    poison = ((0, 2), (1, 3), (1, 4))
    plan = Plan(str(tmp_path), poison=poison, guard_options={"max_skipped_in_a_row": 2})
    found = two_ranks.run(train, plan=plan)
    assert [answer.code for answer in found] == ["RUNTIME_NAN_LOSS"] * 2
    resumed = two_ranks.run(train, plan=replace(plan, poison=()))
    assert [outcome.steps_completed for outcome in resumed] == [6, 6]


def test_a_signal_to_one_rank_stops_all_at_the_same_step_and_the_resumed_run_is_bit_identical(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    plan = Plan(f"{tmp_path}/stopped", strikes=(Strike(0, step=2, phase="backward", layer=2),), stop=(1, 4))
    stopped = two_ranks.run(train, plan=plan)
    assert [answer.code for answer in stopped] == ["RUNTIME_TRAINING_ABORTED"] * 2
    resumed = two_ranks.run(train, plan=replace(plan, stop=None))
    whole = two_ranks.run(train, plan=replace(plan, run_dir=f"{tmp_path}/whole", stop=None))
    assert [outcome.weights for outcome in resumed] == [outcome.weights for outcome in whole]
    assert [outcome.samples for outcome in resumed] == [outcome.samples[-8:] for outcome in whole]


def test_a_rank_that_is_killed_ends_the_others_with_a_typed_error(two_ranks: RankPool, tmp_path: Path) -> None:
    plan = Plan(str(tmp_path), kill=(1, 4), guard_options={"checkpoint_every_steps": 2})
    survivor, killed = two_ranks.run(train, plan=plan)
    assert killed is None
    assert (survivor.kind, survivor.code) == ("RankLostError", "RUNTIME_RANK_LOST")
    resumed = two_ranks.run(train, plan=replace(plan, kill=None))
    whole = two_ranks.run(train, plan=replace(plan, run_dir=f"{tmp_path}/whole", kill=None))
    assert [outcome.weights for outcome in resumed] == [outcome.weights for outcome in whole]


def test_the_clock_of_one_rank_makes_all_save(two_ranks: RankPool, tmp_path: Path) -> None:
    plan = Plan(str(tmp_path), guard_options={"checkpoint_every_s": 1e-9})
    two_ranks.run(train, plan=plan)
    assert {path.name for path in (tmp_path / "checkpoints").glob("step-*")} == {"step-00000005", "step-00000006"}


def test_only_rank_0_writes_into_the_run_directory(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(train, plan=Plan(str(tmp_path)))
    log = (tmp_path / "events.jsonl").read_text().splitlines()
    assert sum('"run_started"' in line for line in log) == 1
    assert sum('"run_finished"' in line for line in log) == 1


def test_a_directory_in_use_is_refused_on_all_ranks(two_ranks: RankPool, tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path, command=["x"]):
        found = two_ranks.run(train, plan=Plan(str(tmp_path)))
    assert [answer.code for answer in found] == ["STATE_RUN_LOCKED"] * 2


def test_another_number_of_ranks_is_a_difference_that_can_be_accepted(
    two_ranks: RankPool, four_ranks: RankPool, tmp_path: Path
) -> None:
    stopped = Plan(str(tmp_path), stop=(0, 3))
    two_ranks.run(train, plan=stopped)
    plan = replace(stopped, stop=None)
    refused = four_ranks.run(train, plan=plan)
    assert [answer.code for answer in refused] == ["CONFIG_RESUME_MISMATCH"] * 4
    assert "world_size" in refused[2].details["differences"]
    accepted = replace(plan, guard_options={"accept_changes": ["world_size"]})
    found = four_ranks.run(train, plan=accepted)
    assert [outcome.steps_completed for outcome in found] == [6] * 4
    assert [len(outcome.samples) for outcome in found] == [3 * 4] * 4


def test_four_ranks_recover_as_two_do(four_ranks: RankPool, tmp_path: Path) -> None:
    strikes = (
        Strike(2, step=2, phase="backward", layer=2),
        Strike(3, step=4, phase="forward", layer=1, rows=1),
    )
    plan = Plan(str(tmp_path), strikes=strikes)
    found = four_ranks.run(train, plan=plan)
    assert apart(found[0], four_ranks.run(plain, plan=plan)[0]) < 1e-5
    assert len({tuple(outcome.weights) for outcome in found}) == 1
