"""Where a run goes back to, and what it leaves out then."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwarden.errors import InvalidSettingError
from trainwarden.guards.rollback import Place, Rollback, RollbackPolicy, Window, skipped


def place(batch: int, epoch: int = 0, phase: int = 0) -> Place:
    return Place(phase, epoch, batch)


def planned(first_step: int, last_step: int, checkpoints: list[int], **options: Any) -> Rollback | None:
    """One batch a step, all remembered."""
    options.setdefault("skip_steps_before", 0)
    return RollbackPolicy(**options).plan(
        first_step=first_step,
        last_step=last_step,
        places={step: place(step) for step in range(last_step + 1)},
        end=place(last_step),
        checkpoints=checkpoints,
        reason="spike",
    )


def test_the_batches_of_the_suspicious_steps_are_left_out_and_no_others() -> None:
    rollback = planned(8, 10, [0, 5])
    assert rollback is not None
    left_out = [batch for batch in range(20) if skipped([rollback.window], place(batch))]
    assert left_out == [7, 8, 9], "batches are counted from 0, steps from 1"
    assert rollback.checkpoint_step == 5


def test_some_batches_before_are_left_out_too() -> None:
    rollback = planned(8, 10, [0, 7], skip_steps_before=3)
    assert rollback is not None
    assert rollback.window == Window(place(4), place(10))
    assert rollback.checkpoint_step == 0, "the checkpoint of step 7 holds batches that are to be left out"


def test_a_checkpoint_inside_the_window_is_better_than_none() -> None:
    rollback = planned(8, 10, [7, 9], skip_steps_before=3)
    assert rollback is not None
    assert rollback.checkpoint_step == 7


@pytest.mark.parametrize("checkpoints", [[], [8], [9, 10]])
def test_without_a_checkpoint_from_before_there_is_no_way_back(checkpoints: list[int]) -> None:
    assert planned(8, 10, checkpoints) is None


def test_the_window_reaches_as_far_back_as_is_remembered() -> None:
    rollback = RollbackPolicy(skip_steps_before=10).plan(
        first_step=8, last_step=9, places={6: place(6), 7: place(7)}, end=place(9), checkpoints=[6], reason="spike"
    )
    assert rollback is not None
    assert rollback.window.begin == place(6)


def test_when_nothing_from_before_is_remembered_no_batch_can_be_named() -> None:
    places = {8: place(8), 9: place(9)}
    assert RollbackPolicy().plan(
        first_step=8, last_step=9, places=places, end=place(9), checkpoints=[2], reason="spike"
    ) is None  # fmt: skip


@given(
    first=st.integers(1, 60),
    more=st.integers(0, 10),
    before=st.integers(0, 70),
    checkpoints=st.lists(st.integers(0, 70), max_size=6),
    remembered=st.integers(0, 70),
)
def test_every_plan_leaves_out_the_suspicious_batches_and_goes_back_before_them(
    first: int, more: int, before: int, checkpoints: list[int], remembered: int
) -> None:
    last = first + more
    places = {step: place(step) for step in range(max(0, last - remembered), last + 1)}
    rollback = RollbackPolicy(skip_steps_before=before).plan(
        first_step=first, last_step=last, places=places, end=place(last), checkpoints=checkpoints, reason=""
    )
    possible = any(step < first for step in checkpoints) and any(step < first for step in places)
    assert (rollback is not None) == possible
    if rollback is not None:
        assert rollback.checkpoint_step in checkpoints
        assert rollback.checkpoint_step < first
        assert all(rollback.window.holds(place(step - 1)) for step in range(first, last + 1))
        assert not rollback.window.holds(place(last))
        assert rollback.window.begin >= place(max(0, first - 1 - before))


def test_a_window_may_reach_over_epochs() -> None:
    window = Window(place(90, epoch=1), place(3, epoch=2))
    inside = [place(90, 1), place(95, 1), place(0, 2), place(2, 2)]
    outside = [place(89, 1), place(3, 2), place(91, 0), place(91, 2), place(95, 1, phase=1)]
    assert all(map(window.holds, inside))
    assert not any(map(window.holds, outside))


@pytest.mark.parametrize(("done", "allowed"), [(0, True), (2, True), (3, False), (9, False)])
def test_a_run_goes_back_only_so_often(done: int, allowed: bool) -> None:
    assert (RollbackPolicy(max_rollbacks=3).refusal(done) is None) is allowed


places = st.builds(Place, st.integers(0, 3), st.integers(0, 9), st.integers(0, 10**6))
counts = st.integers(0, 10**6)


@given(st.builds(Rollback, st.builds(Window, places, places), counts, counts, counts, st.floats(0.01, 1), st.text()))
def test_a_return_reads_back_as_it_was_written(rollback: Rollback) -> None:
    assert Rollback.from_dict(json.loads(json.dumps(rollback.to_dict()))) == rollback


@pytest.mark.parametrize(
    "wrong",
    [{"max_rollbacks": 0}, {"skip_steps_before": -1}, {"learning_rate_factor": 0.0}, {"learning_rate_factor": 1.5}],
)
def test_a_policy_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidSettingError, match=r"rollback\."):
        RollbackPolicy(**wrong)
