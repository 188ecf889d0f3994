"""The search for the largest value: always the true one, in few evaluations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwarden.memory.largest import largest

LINES = st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 50)), min_size=1, max_size=4)


def need_of(lines: list[tuple[int, int]]) -> Callable[[int], int]:
    """Memory as it is: the maximum over phases of a fixed part and one for each row."""
    return lambda value: max(fixed + slope * value for fixed, slope in lines)


class Counted:
    def __init__(self, need: Callable[[int], int]) -> None:
        self.need = need
        self.asked: list[int] = []

    def __call__(self, value: int) -> int:
        self.asked.append(value)
        return self.need(value)


@settings(deadline=None, max_examples=300, print_blob=True)
@given(
    lines=LINES,
    budget=st.integers(0, 3000),
    most=st.sampled_from([1, 5, 64, 1000]),
    step=st.sampled_from([1, 1, 4]),
    guess=st.none() | st.integers(1, 1200),
    known=st.none() | st.integers(1, 1000),
)
def test_it_is_the_true_one(
    lines: list[tuple[int, int]], budget: int, most: int, step: int, guess: int | None, known: int | None
) -> None:
    need = Counted(need_of(lines))
    values = range(step, max(step, most // step * step) + 1, step)
    before = {known: need.need(known)} if known in values and known is not None else {}
    found = largest(need, budget, most=most, step=step, guess=guess, known=before)
    assert found.value == max((value for value in values if need.need(value) <= budget), default=0)
    assert set(need.asked) <= set(values)
    assert len(need.asked) == len(set(need.asked)) == found.evaluations
    if 0 < found.value < values[-1]:
        assert found.next_bytes == need.need(found.value + step)
        assert need.need(found.value) <= found.bytes_at_value <= budget


def test_a_right_guess_is_proven_by_its_successor_alone_when_a_smaller_value_is_known() -> None:
    need = Counted(lambda rows: 100 + 10 * rows)
    found = largest(need, 145, most=64, guess=4, known={1: 110})
    assert (found.value, found.bytes_at_value, found.next_bytes) == (4, 140, 150)
    assert need.asked == [5]


def test_without_anything_known_the_guess_and_its_successor_are_computed() -> None:
    need = Counted(lambda rows: 100 + 10 * rows)
    assert largest(need, 145, most=64, guess=4).value == 4
    assert sorted(need.asked) == [4, 5]


def test_what_was_computed_before_is_not_computed_again() -> None:
    need = Counted(lambda rows: 100 + 10 * rows)
    found = largest(need, 145, most=64, guess=4, known={4: 140, 5: 150})
    assert (found.value, found.evaluations) == (4, 0)


def test_nothing_fits() -> None:
    found = largest(lambda rows: 100 + rows, 50, most=64)
    assert (found.value, found.bytes_at_value, found.next_bytes) == (0, 101, 101)


def test_everything_fits_and_nothing_larger_was_asked_for() -> None:
    found = largest(lambda rows: 100, 200, most=64)
    assert (found.value, found.next_bytes) == (64, None)


@pytest.mark.parametrize("flat_up_to", [3, 30])
def test_a_flat_beginning_misleads_nobody(flat_up_to: int) -> None:
    """Full fine-tuning: the optimizer's step is the peak until the activations outgrow it."""
    need = Counted(lambda rows: max(1000, 1000 + 40 * (rows - flat_up_to)))
    assert largest(need, 1500, most=4096, guess=1).value == flat_up_to + 12
    assert len(need.asked) <= 16
