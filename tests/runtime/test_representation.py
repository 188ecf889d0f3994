"""How far samples are spread out, and what of a module's output counts as samples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trainwarden.errors import InvalidSettingError
from trainwarden.guards.collapse import CollapsePolicy
from trainwarden.runtime.representation import MAX_SAMPLES, Representation, as_samples, spread_of


def reference(samples: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    """The same figures, from their definitions."""
    singular = np.linalg.svd(samples, compute_uv=False)
    shares = singular[singular > 0] / singular.sum()
    count = len(samples)
    pairs = [np.linalg.norm(samples[i] - samples[j]) for i in range(count) for j in range(i)]
    return samples.var(axis=0, ddof=1).mean(), math.exp(-(shares * np.log(shares)).sum()), float(np.mean(pairs))


@given(st.integers(0, 1000), st.integers(2, 12), st.integers(1, 12), st.floats(0.01, 100.0))
@settings(deadline=None, max_examples=30)
def test_the_figures_are_those_of_their_definitions(seed: int, count: int, width: int, scale: float) -> None:
    samples = np.random.default_rng(seed).normal(size=(count, width)) * scale
    spread = spread_of(torch.from_numpy(samples))
    expected = reference(samples)
    assert (spread.variance, spread.effective_rank, spread.pairwise_distance) == pytest.approx(expected, rel=1e-5)


def test_collapses_of_each_kind_show_in_their_figure() -> None:
    healthy = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    base = spread_of(healthy)
    same = spread_of(healthy[:1].expand(64, 16))
    assert same.variance == pytest.approx(0.0, abs=1e-12)
    assert same.pairwise_distance == pytest.approx(0.0, abs=1e-6)
    line = spread_of(healthy[:, :1] @ torch.ones(1, 16))
    assert line.effective_rank == pytest.approx(1.0, abs=1e-3)
    assert base.effective_rank > 14
    assert spread_of(torch.zeros(8, 4)).effective_rank == 1.0


@pytest.mark.parametrize(
    "samples", [torch.ones(1, 4), torch.ones(4, 0), torch.tensor([[1.0, math.nan], [1.0, 2.0]]), torch.ones(0, 3)]
)
def test_what_cannot_be_measured_is_unknown(samples: Tensor) -> None:
    assert math.isnan(spread_of(samples).variance)


def test_half_precision_and_many_samples_are_measured_in_double_precision_and_few() -> None:
    samples = torch.randn(MAX_SAMPLES + 500, 4).bfloat16()
    assert spread_of(samples) == spread_of(samples[:MAX_SAMPLES].double())


@pytest.mark.parametrize(
    ("output", "shape"),
    [
        (torch.ones(3, 5), (3, 5)),
        (torch.ones(2, 3, 5), (6, 5)),
        (torch.ones(4), (4, 1)),
        ((torch.ones(2, 5), torch.ones(9)), (2, 5)),
        ({"last_hidden_state": torch.ones(2, 3, 5), "more": 1}, (6, 5)),
        ([{"x": torch.ones(2, 7)}], (2, 7)),
    ],
)
def test_leading_dimensions_are_samples(output: Any, shape: tuple[int, int]) -> None:
    assert tuple(as_samples(output).shape) == shape


@pytest.mark.parametrize("output", [torch.tensor(1.0), None, [], {}, "text", 3])
def test_what_holds_no_samples_is_refused(output: Any) -> None:
    with pytest.raises(InvalidSettingError, match="watch_representation"):
        as_samples(output)


def test_only_the_steps_that_are_measured_are_hooked() -> None:
    module = nn.Linear(4, 4)
    watched = Representation("encoder", module, CollapsePolicy(every_steps=3))
    hooked = []
    for step in range(1, 8):
        watched.prepare(step)
        watched.prepare(step)  # again changes nothing
        hooked.append(len(module._forward_hooks))
        module(torch.randn(8, 4))
        watched.measure(step)
        assert not module._forward_hooks
    assert hooked == [0, 0, 1, 0, 0, 1, 0]
    assert watched.state.first is not None


def test_a_step_is_measured_once() -> None:
    calls: list[int] = []

    def samples() -> Tensor:
        calls.append(1)
        return torch.randn(8, 4)

    watched = Representation("encoder", samples, CollapsePolicy(every_steps=2))
    for _ in range(3):
        watched.measure(2)
    assert len(calls) == 1


def test_drawing_samples_leaves_the_random_streams_where_they_were() -> None:
    watched = Representation("encoder", lambda: torch.randn(8, 4), CollapsePolicy(every_steps=1))
    torch.manual_seed(4)
    watched.measure(1)
    drawn = torch.randn(3)
    torch.manual_seed(4)
    assert torch.equal(drawn, torch.randn(3))


def test_the_reference_may_be_a_module_too() -> None:
    online, target = nn.Linear(4, 4), nn.Identity()
    watched = Representation("online", online, CollapsePolicy(every_steps=1, patience=1), reference=target)
    watched.prepare(1)
    with torch.no_grad():
        online.weight.mul_(1e-3)
    inputs = torch.randn(16, 4)
    online(inputs), target(inputs)
    collapse = watched.measure(1)
    assert collapse is not None
    assert collapse.criterion == "variance"
    assert not online._forward_hooks
    assert not target._forward_hooks


def test_a_module_that_was_not_called_says_nothing() -> None:
    watched = Representation("encoder", nn.Identity(), CollapsePolicy(every_steps=1, patience=1))
    watched.prepare(1)
    assert watched.measure(1) is None
    assert watched.state.first is None
