"""Clipping under the guard is torch's, bit for bit, and keeps what it has learned about the gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trainwarden.runtime.clipping import Clipping, measured
from trainwarden.runtime.phases import clip_grad_norm

NORMS = [1.0, 2.0, 3.0, math.inf]


def parameters_of(dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.zeros(shape).to(dtype)) for shape in ((7,), (30, 40), (5, 5))]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
    return parameters


def clip(parameters: list[nn.Parameter], max_norm: float, **options: Any) -> tuple[Tensor, list[Clipping]]:
    kept: list[Clipping] = []
    asked: dict[str, Any] = {"norm_type": 2.0, "error_if_nonfinite": False, "foreach": None, **options}
    norm = clip_grad_norm(parameters, max_norm, recover=True, say=lambda _: None, keep=kept.append, **asked)
    return norm, kept


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@given(st.integers(0, 99), st.sampled_from(NORMS), st.sampled_from([0.1, 1.0, 1e9, math.inf]))
@settings(deadline=None, max_examples=10)
def test_norm_and_gradients_are_those_of_torch(dtype: torch.dtype, seed: int, kind: float, max_norm: float) -> None:
    ours, theirs = parameters_of(dtype, seed), parameters_of(dtype, seed)
    norm, _ = clip(ours, max_norm, norm_type=kind)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm, kind))
    for one, other in zip(ours, theirs, strict=True):
        assert one.grad is not None
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


def test_what_was_clipped_and_left_alone_is_known() -> None:
    parameters = parameters_of(torch.float32)
    norm, (clipping,) = clip(parameters, 1.0)
    gradients = [p.grad for p in parameters if p.grad is not None]
    assert clipping.norm is norm
    assert clipping.covers(gradients)
    assert clipping.covers(gradients[1:])
    assert not clipping.covers([*gradients, torch.ones(2)])
    gradients[1].add_(1.0)
    assert not clipping.covers(gradients)
    assert clipping.covers(gradients[:1])


def test_before_it_is_sealed_it_covers_nothing() -> None:
    _, clipping = measured([torch.ones(3)], 2.0, False, None)
    assert clipping is not None
    assert not clipping.covers(clipping.gradients)


@pytest.mark.parametrize(("value", "kind"), [(math.nan, "nan"), (math.inf, "+inf"), (-math.inf, "-inf")])
def test_the_culprit_is_found_before_its_scaling_spoils_the_rest(value: float, kind: str) -> None:
    parameters = parameters_of(torch.float32)
    assert parameters[1].grad is not None
    parameters[1].grad[3, 3] = value
    _, (clipping,) = clip(parameters, 1.0)
    found = clipping.first_bad()
    assert found is not None
    assert found[0] is parameters[1].grad
    assert found[1] == kind
    clipping.culprit = None  # as on a device, where nobody looked
    found = clipping.first_bad()
    assert found is not None
    assert found[0] is parameters[1].grad
    assert found[1] == ("nan" if kind == "nan" else "inf")


def test_a_norm_that_only_overflows_accuses_nobody() -> None:
    parameters = parameters_of(torch.float32)
    assert parameters[0].grad is not None
    parameters[0].grad.fill_(3e38)
    norm, (clipping,) = clip(parameters, 1.0)
    assert norm.isinf()
    assert clipping.culprit is None


@pytest.mark.parametrize("norm_type", [0.0, 0.5])
def test_a_norm_that_does_not_tell_is_not_kept(norm_type: float) -> None:
    _, kept = clip(parameters_of(torch.float32), 1.0, norm_type=norm_type)
    assert not kept


def test_gradients_of_several_kinds_are_left_to_torch() -> None:
    parameters = [*parameters_of(torch.float32), *parameters_of(torch.float64)]
    norm, kept = clip(parameters, 1.0)
    assert not kept
    others = [*parameters_of(torch.float32), *parameters_of(torch.float64)]
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(others, 1.0))


def test_an_error_that_was_asked_for_is_torch_s() -> None:
    parameters = parameters_of(torch.float32)
    assert parameters[0].grad is not None
    parameters[0].grad.fill_(math.nan)
    before = [p.grad.clone() for p in parameters if p.grad is not None]
    with pytest.raises(RuntimeError, match="is non-finite, so it cannot be clipped"):
        clip(parameters, 1.0, error_if_nonfinite=True)
    assert all(torch.equal(p.grad, b) for p, b in zip(parameters[1:], before[1:], strict=True))  # type: ignore[arg-type]


def test_nothing_to_clip_is_no_trouble() -> None:
    norm, kept = clip([nn.Parameter(torch.ones(2))], 1.0)
    assert norm == 0.0
    assert not kept
