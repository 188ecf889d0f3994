"""The alarm before the exact pass: nothing that is not finite escapes it, whatever its type and size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainwarden.runtime.finite_check import largest_magnitudes, looks_finite, losses_bad, norms_of

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")


def tensors_of(dtype: torch.dtype, sizes: Any = (3, 5000, 70)) -> list[Tensor]:
    return [torch.ones(size).to(dtype) for size in sizes]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@given(st.integers(0, 2), st.integers(0, 10**6))
@settings(deadline=None, max_examples=10)
def test_no_value_that_is_none_escapes(dtype: torch.dtype, value: float, index: int, place: int) -> None:
    gradients = tensors_of(dtype)
    assert looks_finite(gradients)
    assert bool(largest_magnitudes(gradients, CPU).isfinite().all())
    gradients[index][place % gradients[index].numel()] = value
    assert not looks_finite(gradients)
    assert largest_magnitudes(gradients, CPU).isfinite().tolist() == [other != index for other in range(3)]


def test_infinities_of_both_signs_do_not_cancel() -> None:
    for size in (4, 9000):
        gradient = torch.zeros(size)
        gradient[0], gradient[1] = math.inf, -math.inf
        assert not looks_finite([gradient])
        assert not largest_magnitudes([gradient], CPU).isfinite().any()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_on_the_device_the_largest_finite_numbers_are_no_alarm(dtype: torch.dtype) -> None:
    gradients = [torch.full((500,), torch.finfo(dtype).max, dtype=dtype)]
    assert bool(largest_magnitudes(gradients, CPU).isfinite().all())


def test_half_precision_is_measured_in_a_type_that_holds_it() -> None:
    assert looks_finite([torch.full((100_000,), 300.0).half()])
    assert looks_finite([torch.full((100_000,), 1e15).bfloat16()])
    assert all(norm.dtype is torch.float32 for norm in norms_of(tensors_of(torch.float16)))


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_counts_as_a_gradient_does(loss: float) -> None:
    assert not looks_finite(tensors_of(torch.float32), [torch.tensor(1.0), torch.tensor(loss)])
    assert not looks_finite([], [torch.tensor(loss)])
    assert losses_bad([torch.tensor(1.0), torch.tensor(loss)], CPU).item() is True
    assert losses_bad([torch.tensor(1.0)], CPU).item() is False


def test_nothing_at_all_is_finite() -> None:
    assert looks_finite([])
    assert looks_finite([torch.ones(0)])
    assert largest_magnitudes([torch.ones(0), torch.ones(2)], CPU).tolist() == [0.0, 1.0]
    assert losses_bad([], CPU).item() is False


def test_types_may_be_mixed() -> None:
    gradients = [torch.full((2,), 3.0, dtype=dtype) for dtype in (*TYPES, torch.float8_e5m2, torch.complex64)]
    assert looks_finite(gradients)
    assert largest_magnitudes(gradients, CPU).isfinite().all()
    gradients[-2] = torch.tensor([1.0, math.inf]).to(torch.float8_e5m2)
    assert not looks_finite(gradients)
    assert largest_magnitudes(gradients, CPU).isfinite().tolist() == [True, True, True, True, False, True]


def test_sparse_gradients_are_measured_by_their_values() -> None:
    sparse = torch.sparse_coo_tensor(torch.tensor([[1, 4]]), torch.tensor([3.0, 4.0]), (6,), check_invariants=True)
    assert looks_finite([sparse])
    assert [norm.item() for norm in norms_of([sparse, torch.ones(4)])] == [5.0, 2.0]
    bad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.tensor([math.nan]), (6,), check_invariants=True)
    assert not looks_finite([torch.ones(4), bad])
