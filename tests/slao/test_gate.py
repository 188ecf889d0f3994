"""Whether a result may stand follows from its norms alone."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwarden.slao import MergePolicy, TensorNorms
from trainwarden.slao.gate import judge, norm_bound
from trainwarden.slao.policy import MODES, Mode

NORM = st.floats(0, 1e6)


def b(before: float, incoming: float, after: float, name: str = "x") -> TensorNorms:
    return TensorNorms(f"{name}.lora_B.weight", before, incoming, after)


def a(before: float, incoming: float, after: float) -> TensorNorms:
    return TensorNorms("x.lora_A.weight", before, incoming, after)


@settings(deadline=None, max_examples=100)
@given(before=NORM, incoming=NORM, share=st.floats(0.01, 1))
def test_a_convex_result_that_has_not_grown_stands(before: float, incoming: float, share: float) -> None:
    after = before + share * (incoming - before)
    found = judge([b(before, incoming, after)], MergePolicy(max_norm_growth=10))
    assert (found is not None) == (before > 0 and after > 10 * before)


@pytest.mark.parametrize("after", [math.nan, math.inf])
def test_a_result_that_is_not_finite_does_not_stand(after: float) -> None:
    found = judge([b(1, 1, 1), b(1, 1, after)], MergePolicy())
    assert found is not None
    assert found.problem == "the result is not finite"


@pytest.mark.parametrize("mode", MODES)
@settings(deadline=None, max_examples=50)
@given(before=st.floats(0.1, 10), incoming=st.floats(0.1, 10))
def test_more_than_the_arithmetic_can_give_is_damage(mode: Mode, before: float, incoming: float) -> None:
    policy = MergePolicy(mode=mode, max_norm_growth=1e9)
    bound = norm_bound(b(before, incoming, 0), policy)
    assert judge([b(before, incoming, bound)], policy) is None
    found = judge([b(before, incoming, bound * 1.01)], policy)
    assert found is not None
    assert "which these inputs cannot give" in found.problem


def test_a_layer_that_was_hardly_used_before_may_begin() -> None:
    usual = [b(1.0, 1.0, 1.0, f"layer{i}") for i in range(7)]
    assert judge([*usual, b(0.0, 5.0, 5.0, "new")], MergePolicy()) is None
    assert judge([*usual, b(0.0, 50.0, 50.0, "new")], MergePolicy()) is not None


def test_an_untrained_accumulator_gives_nothing_to_compare_with() -> None:
    assert judge([b(0.0, 5.0, 5.0)], MergePolicy()) is None


def test_kinds_are_compared_among_themselves() -> None:
    assert judge([a(100.0, 100.0, 100.0), b(0.1, 5.0, 5.0)], MergePolicy()) is not None


def test_the_limit_is_the_users() -> None:
    assert judge([b(1.0, 15.0, 15.0)], MergePolicy(max_norm_growth=20)) is None
    found = judge([b(1.0, 15.0, 15.0)], MergePolicy(max_norm_growth=10))
    assert found is not None
    assert found.limit == 10


def test_nothing_to_judge_is_no_divergence() -> None:
    assert judge([], MergePolicy()) is None
