"""The next task starts from an orthonormal A that still points where the last one did."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwarden import slao
from trainwarden.errors import SLAOError
from trainwarden.slao import orthogonal
from trainwarden.slao.factors import Kind, keys_of
from trainwarden.slao.orthogonal import orthonormal

from . import reference
from .adapters import PREFIX, same, state

A = f"{PREFIX}.0.self_attn.q_proj.lora_A.weight"


def off_orthogonal(rows: torch.Tensor) -> float:
    return float((rows @ rows.T - torch.eye(rows.shape[0])).abs().max())


@settings(deadline=None, max_examples=30, print_blob=True)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 5))
def test_it_is_the_papers_start_by_an_independent_computation(seed: int, rank: int) -> None:
    finetuned = state(seed, rank=rank)
    expected = reference.start(reference.arrays(finetuned))
    # Rows of nearly dependent factors are determined less well than float32 resolves.
    if min(torch.linalg.svdvals(finetuned[key])[-1] for key in keys_of(Kind.A, finetuned)) > 0.3:
        assert reference.distance(slao.init_adapter(finetuned), expected) < 2e-6


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 12), width=st.integers(1, 12))
def test_rows_are_orthonormal_or_columns_where_there_are_more_rows(seed: int, rank: int, width: int) -> None:
    a = torch.randn(rank, width, generator=torch.Generator().manual_seed(seed))
    start = orthonormal(a)
    assert start.shape == a.shape
    assert off_orthogonal(start if rank <= width else start.T) < 1e-5


def test_the_signs_are_fixed_so_that_rows_keep_their_direction() -> None:
    a = torch.diag(torch.tensor([3.0, -2.0, 0.5, -1.0]))
    assert torch.allclose(orthonormal(a), torch.diag(torch.tensor([1.0, -1.0, 1.0, -1.0])), atol=1e-6)
    cosines = torch.nn.functional.cosine_similarity(orthonormal(wide := torch.randn(8, 512)), wide)
    assert cosines.min() > 0.9


def test_a_zero_on_the_diagonal_deletes_no_row() -> None:
    a = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 2.0]])  # its second row adds nothing
    assert off_orthogonal(orthonormal(a)) < 1e-5


def test_all_but_a_is_as_it_was_trained() -> None:
    finetuned = state(1, dora=True)
    start = slao.init_adapter(finetuned)
    rest = [key for key in finetuned if key not in keys_of(Kind.A, finetuned)]
    assert same({k: start[k] for k in rest}, {k: finetuned[k] for k in rest})
    assert same(finetuned, state(1, dora=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_decomposed_in_float32(dtype: torch.dtype) -> None:
    start = slao.init_adapter(state(1, dtype=dtype))
    assert {value.dtype for value in start.values()} == {dtype}
    assert off_orthogonal(start[A].float()) < 2e-2


def test_a_convolution_is_decomposed_over_all_its_inputs() -> None:
    a = torch.randn(4, 3, 3, 3)
    start = orthonormal(a)
    assert start.shape == a.shape
    assert off_orthogonal(start.reshape(4, -1)) < 1e-5


def test_one_nan_is_refused_before_it_becomes_a_matrix_of_them() -> None:
    finetuned = state(1)
    finetuned[A][0, 0] = float("nan")
    with pytest.raises(SLAOError, match=r"q_proj.lora_A.weight is not finite"):
        slao.init_adapter(finetuned)


def test_arithmetic_that_gives_less_than_orthogonal_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.linalg.qr
    monkeypatch.setattr(orthogonal.torch.linalg, "qr", lambda a: tuple(x * 1.01 for x in real(a)))
    with pytest.raises(SLAOError, match="off orthogonal"):
        slao.init_adapter(state(1))


def test_overlap_is_one_for_the_same_subspace_and_zero_for_orthogonal_ones() -> None:
    first = {A: torch.eye(8)[:3]}
    assert slao.overlap(first, {A: torch.randn(3, 3) @ torch.eye(8)[:3]})[A] == pytest.approx(1.0, abs=1e-5)
    assert slao.overlap(first, {A: torch.eye(8)[3:6]})[A] == pytest.approx(0.0, abs=1e-6)
    assert slao.overlap(first, {A: torch.eye(8)[2:5]})[A] == pytest.approx(1 / 3, abs=1e-6)


def test_unrelated_subspaces_overlap_by_rank_over_width() -> None:
    found = [slao.overlap({A: torch.randn(4, 400)}, {A: torch.randn(4, 400)})[A] for _ in range(20)]
    assert sum(found) / 20 == pytest.approx(4 / 400, rel=0.4)


def test_a_factor_that_spans_everything_overlaps_with_anything() -> None:
    assert slao.overlap({A: torch.randn(9, 4)}, {A: torch.randn(9, 4)}) == {A: 1.0}
