"""Which checkpoints go: never the new one, never the last good ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwarden.checkpoint.layout import Slot, next_slot
from trainwarden.checkpoint.retention import removable

slots = st.builds(Slot, st.integers(0, 12), st.integers(1, 3))
histories = st.dictionaries(slots, st.booleans(), max_size=12)  # whether each verifies


def decide(history: dict[Slot, bool], step: int, keep_last: int) -> tuple[Slot, set[Slot]]:
    newest = next_slot(step, list(history))
    removed = removable([*history, newest], newest=newest, keep_last=keep_last, is_verified=history.__getitem__)
    assert removed == sorted(set(removed))
    return newest, set(removed)


@given(histories, st.integers(0, 14), st.integers(1, 4))
def test_the_new_one_is_never_removed(history: dict[Slot, bool], step: int, keep_last: int) -> None:
    newest, removed = decide(history, step, keep_last)
    assert newest not in removed


@given(histories, st.integers(0, 14), st.integers(1, 4))
def test_the_newest_good_step_always_stays(history: dict[Slot, bool], step: int, keep_last: int) -> None:
    newest, removed = decide(history, step, keep_last)
    good = {slot for slot, verified in history.items() if verified} | {newest}
    steps = sorted({slot.step for slot in good}, reverse=True)[:keep_last]
    assert set(steps) <= {slot.step for slot in good - removed}


@given(histories, st.integers(0, 14), st.integers(1, 4))
def test_a_good_one_only_goes_for_enough_newer_good_ones_or_a_later_one_of_its_step(
    history: dict[Slot, bool], step: int, keep_last: int
) -> None:
    newest, removed = decide(history, step, keep_last)
    good_left = {slot for slot, verified in history.items() if verified and slot not in removed} | {newest}
    for slot in removed:
        repeated = any(other.step == slot.step and other > slot for other in good_left)
        assert repeated or sum(other > slot for other in good_left) >= keep_last


@given(histories, st.integers(1, 4))
def test_after_saving_the_latest_step_exactly_the_last_good_steps_are_left(
    history: dict[Slot, bool], keep_last: int
) -> None:
    newest, removed = decide(history, 14, keep_last)
    good = {slot for slot, verified in history.items() if verified} | {newest}
    expected: dict[int, Slot] = {}
    for slot in sorted(good):
        expected[slot.step] = slot
    assert good - removed == {expected[step] for step in sorted(expected)[-keep_last:]}


@given(histories, st.integers(0, 14), st.integers(1, 4))
def test_deciding_twice_removes_nothing_more(history: dict[Slot, bool], step: int, keep_last: int) -> None:
    newest, removed = decide(history, step, keep_last)
    left = {slot: verified for slot, verified in history.items() if slot not in removed} | {newest: True}
    assert removable(left, newest=newest, keep_last=keep_last, is_verified=left.__getitem__) == []


def test_no_more_is_verified_than_the_decision_needs() -> None:
    asked: list[Slot] = []

    def is_verified(slot: Slot) -> bool:
        asked.append(slot)
        return slot.step != 30

    history = [Slot(step) for step in (10, 20, 30, 40)]
    assert removable(history, newest=Slot(40), keep_last=2, is_verified=is_verified) == [Slot(10)]
    assert asked == [Slot(30), Slot(20)]


@pytest.mark.parametrize(
    ("history", "new_step", "keep_last", "removed"),
    [
        ({}, 10, 2, []),
        ({Slot(10): True, Slot(20): True}, 30, 2, [Slot(10)]),
        ({Slot(10): True, Slot(20): False}, 30, 2, []),
        ({Slot(10): False, Slot(20): False}, 30, 2, []),
        ({Slot(10): False, Slot(20): True}, 30, 2, [Slot(10)]),
        ({Slot(10): True, Slot(20): False}, 20, 2, [Slot(20)]),
        ({Slot(10): True, Slot(20): True}, 20, 2, [Slot(20)]),
        ({Slot(10): True, Slot(20): True, Slot(90): True}, 30, 2, [Slot(10), Slot(20)]),
        ({Slot(80): True, Slot(90): True}, 30, 1, []),
    ],
)
def test_examples(history: dict[Slot, bool], new_step: int, keep_last: int, removed: list[Slot]) -> None:
    assert decide(history, new_step, keep_last)[1] == set(removed)
