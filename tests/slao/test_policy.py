"""λ(i) of every schedule, and the settings that are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwarden import slao
from trainwarden.errors import InvalidSettingError


def test_the_default_is_the_papers() -> None:
    policy = slao.MergePolicy()
    assert policy.mode == "slao"
    assert [policy.weight(i) for i in (2, 4, 9)] == [1 / math.sqrt(2), 0.5, pytest.approx(1 / 3)]


def test_the_other_schedules() -> None:
    assert slao.MergePolicy(schedule="inverse").weight(4) == 0.25
    assert slao.MergePolicy(schedule="inverse_log").weight(2) == pytest.approx(1 / math.log(3))
    assert slao.MergePolicy(schedule="constant", constant=0.3).weight(50) == 0.3
    assert slao.MergePolicy(schedule=lambda i: 2 / (i + 2)).weight(2) == 0.5


@settings(deadline=None, max_examples=50)
@given(schedule=st.sampled_from(slao.SCHEDULES), index=st.integers(2, 10**9))
def test_a_weight_is_a_share(schedule: slao.policy.Schedule, index: int) -> None:
    assert 0 < slao.MergePolicy(schedule=schedule).weight(index) <= 1


@pytest.mark.parametrize("value", [0.0, -0.5, 1.5, math.nan, math.inf])
def test_a_schedule_of_the_users_must_stay_a_share(value: float) -> None:
    with pytest.raises(InvalidSettingError, match="above 0 and at most 1"):
        slao.MergePolicy(schedule=lambda i: value).weight(3)


@pytest.mark.parametrize("index", [1, 0, -3])
def test_there_is_no_weight_before_the_second_adapter(index: int) -> None:
    with pytest.raises(InvalidSettingError, match="at least 2"):
        slao.MergePolicy().weight(index)


@pytest.mark.parametrize(
    "setting",
    [
        {"mode": "median"},
        {"schedule": "cosine"},
        {"constant": 0.0},
        {"constant": math.nan},
        {"density": 0.0},
        {"density": 1.1},
        {"max_norm_growth": 1.0},
        {"max_norm_growth": math.nan},
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_refused_by_name(setting: dict[str, Any]) -> None:
    with pytest.raises(InvalidSettingError, match=next(iter(setting))):
        slao.MergePolicy(**setting)


def test_records_name_the_schedule() -> None:
    def halving(index: int) -> float:
        return 0.5

    assert slao.MergePolicy().schedule_name == "inverse_sqrt"
    assert slao.MergePolicy(schedule="constant", constant=0.25).schedule_name == "constant 0.25"
    assert slao.MergePolicy(schedule=halving).schedule_name == "halving"
