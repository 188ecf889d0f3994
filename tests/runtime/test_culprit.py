"""The first tensor that is not finite is named, with what it holds; large finite values are no culprits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainwarden.guards.finite import Culprit
from trainwarden.runtime import culprit
from trainwarden.runtime.culprit import first_culprit, first_named, is_finite, kind_of

KINDS = {"nan": math.nan, "+inf": math.inf, "-inf": -math.inf}
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2, torch.complex64]


def holding(value: float, dtype: torch.dtype, place: int = 5) -> Tensor:
    values = torch.ones(12)
    values[place] = value
    return values.to(dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_is_that_of_the_element(dtype: torch.dtype, kind: str) -> None:
    assert kind_of(holding(KINDS[kind], dtype)) == kind


def test_the_8_bit_type_without_infinities_can_still_be_no_number() -> None:
    assert kind_of(holding(math.nan, torch.float8_e4m3fn)) == "nan"
    assert kind_of(torch.full((4,), 448.0).to(torch.float8_e4m3fn)) is None


@pytest.mark.parametrize("dtype", [t for t in TYPES if not t.is_complex and t.itemsize > 1], ids=str)
def test_the_largest_numbers_of_a_type_are_finite(dtype: torch.dtype) -> None:
    assert is_finite(torch.full((1000,), torch.finfo(dtype).max, dtype=dtype))
    assert is_finite(torch.full((1000,), torch.finfo(dtype).min, dtype=dtype))


def test_the_imaginary_part_counts_too() -> None:
    assert kind_of(torch.tensor([1 + 1j, complex(0, -math.inf)])) == "-inf"


@pytest.mark.parametrize("tensor", [torch.ones(3, dtype=torch.int64), torch.ones(2, dtype=torch.bool), torch.ones(0)])
def test_what_cannot_hold_it_does_not(tensor: Tensor) -> None:
    assert kind_of(tensor) is None


def test_sparse_and_strided_tensors_are_looked_at_where_their_values_are() -> None:
    sparse = torch.sparse_coo_tensor(torch.tensor([[1, 4]]), torch.tensor([1.0, math.inf]), (6,), check_invariants=True)
    assert kind_of(sparse) == "+inf"
    table = torch.ones(6, 6)
    table[3, 2] = math.nan
    assert kind_of(table[:, 2]) == "nan"
    assert kind_of(table[:, 3]) is None
    assert kind_of(table.T) == "nan"


def test_a_large_tensor_is_looked_at_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(culprit, "_CHUNK", 4)
    assert kind_of(holding(math.nan, torch.float32, place=11)) == "nan"
    assert kind_of(torch.ones(12)) is None


@given(st.lists(st.sampled_from([0.0, 1.0, -3e38, math.nan, math.inf, -math.inf]), min_size=1, max_size=20))
@settings(deadline=None, max_examples=50)
def test_the_first_element_decides(values: list[float]) -> None:
    bad = next((value for value in values if not math.isfinite(value)), None)
    expected = None if bad is None else next(k for k, v in KINDS.items() if v == bad or (bad != bad and v != v))
    assert kind_of(torch.tensor(values)) == expected


def test_the_first_name_counts() -> None:
    named = [("a", torch.ones(2)), ("b", holding(math.inf, torch.float32)), ("c", holding(math.nan, torch.float32))]
    assert first_named(named) == ("b", "+inf")
    assert first_named(named[:1]) is None


def test_a_loss_is_named_before_the_gradients_it_spoils() -> None:
    losses = [torch.tensor(1.0), torch.tensor(math.nan), torch.tensor(math.inf)]
    gradients = [("w", torch.full((2,), math.nan))]
    assert first_culprit(losses, gradients) == Culprit("loss", "nan", 1, 3)


@pytest.mark.parametrize(("passes", "micro_batch"), [(1, 0), (2, None), (0, None)])
def test_a_gradient_is_of_a_known_pass_only_where_there_was_one(passes: int, micro_batch: int | None) -> None:
    losses = [torch.tensor(1.0)] * passes
    gradients = [("v", torch.ones(2)), ("w", torch.full((2,), -math.inf))]
    assert first_culprit(losses, gradients) == Culprit("w", "-inf", micro_batch, passes)


def test_without_a_culprit_nobody_is_accused() -> None:
    assert first_culprit([torch.tensor(1e38)], [("w", torch.full((9,), 3e38))]) is None
