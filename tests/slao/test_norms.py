"""One pass tells norms and whether values are finite; the exact look names what is wrong."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwarden.slao.factors import Kind
from trainwarden.slao.norms import TensorNorms, as_details, norms_of, square_sum, total, what_is_not_finite

FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)


def norm(values: torch.Tensor) -> float:
    return norms_of([square_sum(values)], [values])[0]


@settings(deadline=None, max_examples=200)
@given(st.lists(FLOATS, min_size=1, max_size=40))
def test_a_norm_is_finite_exactly_when_all_values_are(values: list[float]) -> None:
    tensor = torch.tensor(values)
    assert math.isfinite(norm(tensor)) == all(map(math.isfinite, values))
    assert (what_is_not_finite(tensor) is None) == all(map(math.isfinite, values))


def test_it_is_the_norm() -> None:
    values = torch.randn(100, 7)
    assert norm(values) == pytest.approx(float(values.double().norm()), rel=1e-5)


def test_squares_that_overflow_are_computed_again() -> None:
    assert norm(torch.full((4,), 1e30)) == pytest.approx(2e30)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([1.0, math.nan, math.inf], "NaN"),
        ([-math.inf, math.inf], "+Inf"),
        ([-math.inf, 0.0], "-Inf"),
        ([0.0], None),
    ],
)
def test_the_worst_is_named(values: list[float], found: str | None) -> None:
    assert what_is_not_finite(torch.tensor(values, dtype=torch.float16)) == found


def test_totals_are_of_one_kind() -> None:
    norms = [TensorNorms("x.lora_B.weight", 3, 6, 0), TensorNorms("y.lora_B.weight", 4, 8, 0)]
    norms.append(TensorNorms("x.lora_A.weight", 100, 100, 100))
    assert total(norms, Kind.B) == {"before": 5, "incoming": 10, "after": 0}
    assert total([], Kind.B) == {"before": 0, "incoming": 0, "after": 0}


def test_details_hold_the_limit_where_there_is_one() -> None:
    norms = TensorNorms("x.lora_B.weight", 1, 2, 3)
    assert as_details(norms) == {"before": 1, "incoming": 2, "after": 3}
    assert as_details(norms, 4) == {"before": 1, "incoming": 2, "after": 3, "limit": 4}
