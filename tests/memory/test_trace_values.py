"""Values of masks and positions are known where they follow from the batch, and unknown where weights take part."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from trainwarden.memory import trace_values
from trainwarden.memory.trace_fake import fake_batch
from trainwarden.memory.trace_place import Whereabouts
from trainwarden.memory.trace_record import Recorder
from trainwarden.memory.trace_values import masks_judged_by_values


@contextmanager
def faked(*real: torch.Tensor) -> Iterator[Any]:
    """Fake twins of real tensors, where operators are recorded."""
    mode = FakeTensorMode()
    twins = fake_batch(real, mode)
    with mode, Recorder(Whereabouts(nn.Module(), {})):
        yield twins[0] if len(twins) == 1 else twins


MASK = torch.tensor([[1, 0], [1, 1]])
ZEROS = torch.zeros(2, 2, dtype=torch.long)
UNKNOWN = torch.empty(2, device="meta", dtype=torch.long)


def test_values_of_the_batch_can_be_asked_for() -> None:
    with faked(MASK) as mask:
        assert not (mask == 1).all()
        assert (mask[1] == 1).all()
        assert mask.sum().item() == 3


def test_shapes_may_depend_on_them() -> None:
    with faked(MASK) as mask:
        assert torch.nonzero(mask).shape == (3, 2)
        assert mask[mask == 1].shape == (3,)
        assert torch.unique(mask).sum().item() == 1


def test_constants_have_values_too() -> None:
    with faked(MASK):
        assert torch.arange(5).max().item() == 4
        assert torch.ones(2, 3).bool().all()
        assert torch.full((3,), 7)[1].item() == 7


def test_the_batch_itself_is_never_written_to() -> None:
    real = torch.tensor([1, 2, 3])
    with faked(real) as fake:
        fake[0] = 9
        assert fake[0].item() == 9
    assert real.tolist() == [1, 2, 3]


def test_writing_through_a_view_is_seen_by_the_whole() -> None:
    with faked(ZEROS) as whole:
        whole[0].fill_(5)
        assert whole.sum().item() == 10


def test_writing_something_unknown_makes_all_views_unknown() -> None:
    with faked(ZEROS, UNKNOWN) as (whole, unknown):
        row = whole[1]
        whole[:, 0] = unknown
        with pytest.raises(DataDependentOutputException):
            row.sum().item()


def test_lists_of_tensors_are_followed() -> None:
    with faked(MASK):
        steps = [torch.tensor(0.0), torch.tensor(3.0)]
        torch._foreach_add_(steps, 1)
        assert [step.item() for step in steps] == [1.0, 4.0]


@pytest.mark.parametrize(
    "make",
    [
        lambda unknown: unknown,
        lambda unknown: torch.ones(2) * unknown,
        lambda unknown: torch.randint(0, 5, (3,)),
        lambda unknown: torch.rand(3) > 0.5,
        lambda unknown: torch.empty(3),
        lambda unknown: torch.zeros(3).uniform_(),
    ],
)
def test_what_weights_and_chance_have_touched_stays_unknown(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with faked(UNKNOWN) as unknown, pytest.raises(DataDependentOutputException):
        make(unknown).sum().item()


def test_large_tensors_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_values, "LARGEST", 10)
    with faked(MASK):
        with pytest.raises(DataDependentOutputException):
            torch.arange(11).max().item()
        assert torch.arange(10).max().item() == 9


@settings(deadline=None, max_examples=25, print_blob=True)
@given(st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), min_size=1, max_size=3), st.integers(0, 2))
def test_the_values_are_those_that_real_tensors_would_have(rows: list[list[int]], column: int) -> None:
    def compute(x: torch.Tensor) -> list[Any]:
        y = x.clone()
        y[:, column] -= 1
        z = torch.cat([y, x.abs()]).cumsum(0)
        return [y.sum().item(), z.max().item(), bool((z > 0).any()), torch.nonzero(y).shape[0]]

    real = torch.tensor(rows)
    with faked(real) as fake:
        found = compute(fake)
    assert found == compute(real)


def test_transformers_is_told_that_nothing_is_traced_and_afterwards_not(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in: Any = ModuleType("transformers.masking_utils")
    stand_in.is_tracing = lambda tensor=None: True
    monkeypatch.setitem(sys.modules, "transformers.masking_utils", stand_in)
    with pytest.raises(ZeroDivisionError), masks_judged_by_values():
        assert not stand_in.is_tracing(torch.zeros(1))
        raise ZeroDivisionError
    assert stand_in.is_tracing()


@pytest.mark.parametrize("module", [None, SimpleNamespace()])
def test_another_or_no_transformers_is_left_alone(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    monkeypatch.setitem(sys.modules, "transformers.masking_utils", module)
    with masks_judged_by_values():
        assert not hasattr(module, "is_tracing")
