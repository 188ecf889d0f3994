"""When a representation has collapsed: low for long, compared with what it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwarden.errors import InvalidSettingError
from trainwarden.guards.collapse import Collapse, CollapsePolicy, CollapseState, Spread

HEALTHY = Spread(variance=1.0, effective_rank=40.0, pairwise_distance=8.0)
POLICY = CollapsePolicy(patience=3)

figures = st.floats(0.0, 100.0)
spreads = st.builds(Spread, figures, figures, figures)


def follow(
    spreads: list[Spread], policy: CollapsePolicy = POLICY, reference_variance: float | None = None
) -> list[Collapse | None]:
    state, found = CollapseState(), []
    for spread in spreads:
        state, collapse = policy.step(state, spread, reference_variance)
        found.append(collapse)
    return found


@pytest.mark.parametrize(
    ("criterion", "low"),
    [
        ("variance", Spread(0.4, 40.0, 8.0)),
        ("effective_rank", Spread(1.0, 19.0, 8.0)),
        ("pairwise_distance", Spread(1.0, 40.0, 3.9)),
    ],
)
def test_each_figure_by_itself_tells_a_collapse_after_enough_measurements(criterion: str, low: Spread) -> None:
    found = follow([HEALTHY, low, low, low, low])
    assert [collapse and collapse.criterion for collapse in found] == [None, None, None, criterion, None]
    collapse = found[3]
    assert collapse is not None
    assert collapse.value < collapse.threshold == 0.5 * getattr(HEALTHY, criterion)
    assert collapse.measurements == 3


def test_one_healthy_measurement_ends_the_count() -> None:
    low = Spread(0.1, 40.0, 8.0)
    assert follow([HEALTHY, low, low, HEALTHY, low, low, HEALTHY]) == [None] * 7


def test_a_collapse_that_passes_and_comes_back_is_told_again() -> None:
    low = Spread(0.1, 40.0, 8.0)
    found = follow([HEALTHY, low, low, low, HEALTHY, low, low, low])
    assert [collapse is not None for collapse in found] == [False] * 3 + [True] + [False] * 3 + [True]


def test_the_variance_is_compared_with_the_reference_where_there_is_one() -> None:
    assert follow([HEALTHY] * 4, reference_variance=1.9) == [None] * 4
    found = follow([HEALTHY] * 3, reference_variance=2.1)
    assert found[2] == Collapse("variance", 1.0, 1.05, 3)


def test_a_measurement_that_is_not_a_number_neither_begins_nor_ends_a_count() -> None:
    low, unknown = Spread(0.1, 40.0, 8.0), Spread(math.nan, math.nan, math.nan)
    found = follow([unknown, HEALTHY, low, unknown, low, unknown, low])
    assert [collapse is not None for collapse in found] == [False] * 6 + [True]


@given(st.lists(spreads, min_size=1, max_size=20), st.integers(1, 4))
def test_no_collapse_without_as_many_low_measurements_in_a_row(measured: list[Spread], patience: int) -> None:
    policy = CollapsePolicy(patience=patience)
    for index, collapse in enumerate(follow(measured, policy)):
        if collapse is None:
            continue
        last = measured[index - patience + 1 : index + 1]
        threshold = 0.5 * getattr(measured[0], collapse.criterion)
        assert len(last) == patience
        assert all(getattr(spread, collapse.criterion) < threshold for spread in last)


@given(st.lists(st.floats(0.5, 50.0), max_size=20))
def test_what_stays_above_half_of_the_first_measurement_is_healthy(factors: list[float]) -> None:
    grown = [Spread(1.0 * f, 40.0 * f, 8.0 * f) for f in factors]
    assert follow([HEALTHY, *grown]) == [None] * (len(factors) + 1)


def test_the_defaults_are_those_of_the_seed() -> None:
    policy = CollapsePolicy()
    assert (policy.every_steps, policy.variance_share, policy.pairwise_distance_share) == (500, 0.5, 0.5)


@pytest.mark.parametrize(
    "wrong", [{"action": "rollback"}, {"every_steps": 0}, {"patience": 0}, {"variance_share": 1.0}]
)
def test_a_policy_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidSettingError, match=r"collapse\."):
        CollapsePolicy(**wrong)
