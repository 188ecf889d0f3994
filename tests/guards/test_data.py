"""How much of the data may be left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwarden.errors import InvalidSettingError
from trainwarden.guards.data import DataLosses, DataPolicy

LOSSES = st.builds(
    lambda batches, samples, more: DataLosses(batches + samples + more, batches, samples, batches + samples / 8),
    st.integers(0, 50),
    st.integers(0, 50),
    st.integers(1, 5000),
)


def batches_lost(count: int, of: int) -> DataLosses:
    return DataLosses(seen=of, batches=count, lost=float(count))


def test_one_bad_batch_of_the_first_ten_ends_nothing() -> None:
    assert not DataPolicy().exceeded(batches_lost(1, of=10))


def test_exactly_the_limit_is_allowed_and_more_is_not() -> None:
    assert not DataPolicy().exceeded(batches_lost(10, of=1000))
    assert DataPolicy().exceeded(batches_lost(11, of=1000))


def test_a_data_set_of_which_nothing_can_be_read_is_noticed_at_the_tenth_batch() -> None:
    exceeded = [DataPolicy().exceeded(batches_lost(count, of=count)) for count in range(1, 12)]
    assert exceeded.index(True) == 9


def test_a_sample_counts_as_its_part_of_a_batch() -> None:
    losses = DataLosses(seen=100, samples=80, lost=80 / 256)
    assert losses.count == 80
    assert losses.share == pytest.approx(0.003125)
    assert not DataPolicy().exceeded(losses)


def test_nothing_seen_is_nothing_lost() -> None:
    assert DataLosses().share == 0.0
    assert not DataPolicy(max_share=0.0, min_count=1).exceeded(DataLosses())


@given(LOSSES, st.floats(0, 1), st.integers(1, 60))
def test_more_patience_never_ends_a_run_earlier(losses: DataLosses, max_share: float, min_count: int) -> None:
    if not DataPolicy(max_share, min_count).exceeded(losses):
        assert not DataPolicy(min(1.0, max_share * 2), min_count).exceeded(losses)
        assert not DataPolicy(max_share, min_count + 1).exceeded(losses)
    assert not DataPolicy(1.0, min_count).exceeded(batches_lost(min(losses.seen, 60), of=losses.seen))


@settings(max_examples=5)
@given(st.integers(0, 2**32 - 1))
def test_what_chance_does_to_the_limit_is_as_the_policy_says(seed: int) -> None:
    """Of runs over 10,000 batches: with 0.2 % bad ones hardly one ends, with 2 % all do, after about 500 batches."""
    random = np.random.default_rng(seed)
    policy = DataPolicy()

    def ended_at(bad_share: float) -> int | None:
        for lost, index in enumerate(np.flatnonzero(random.random(10_000) < bad_share), start=1):
            if policy.exceeded(batches_lost(lost, of=int(index) + 1)):
                return int(index) + 1
        return None

    assert sum(ended_at(0.002) is not None for _ in range(100)) <= 2
    ends = [ended_at(0.02) for _ in range(100)]
    assert None not in ends
    assert 350 <= np.median([end for end in ends if end is not None]) <= 650


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_share": -0.1},
        {"max_share": 1.5},
        {"max_share": float("nan")},
        {"max_share": "1 %"},
        {"max_share": True},
        {"min_count": 0},
        {"min_count": 2.5},
        {"min_count": True},
        {"worker_timeout_s": 0},
        {"worker_timeout_s": -1.0},
        {"worker_timeout_s": "soon"},
    ],
)
def test_a_policy_that_means_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidSettingError, match=rf"data\.{next(iter(wrong))}"):
        DataPolicy(**wrong)


def test_the_timeout_may_be_switched_off_and_is_shorter_than_nccls_by_default() -> None:
    assert DataPolicy(worker_timeout_s=None).worker_timeout_s is None
    default_s = DataPolicy().worker_timeout_s
    assert default_s is not None
    assert default_s < 600
