"""Losses and norms of steps arrive in order, each with its step."""

from __future__ import annotations

import math

import pytest
import torch

from trainwarden.runtime.late_values import LateValues, StepValues, both_finite


def test_the_losses_of_a_step_are_added_and_its_norms_combined() -> None:
    values = LateValues()
    values.note_losses([torch.tensor(1.0), torch.tensor(0.5)])
    values.note_norms([torch.tensor(3.0)])
    values.note_norms([torch.tensor(4.0)])  # of a second optimizer
    values.close(7)
    assert values.poll() == [StepValues(7, 1.5, 5.0)]
    assert values.poll() == []


def test_the_norm_from_before_clipping_counts() -> None:
    values = LateValues()
    values.note_clipping(torch.tensor(12.0))
    values.note_norms([torch.tensor(1.0)])
    values.close(1)
    values.note_norms([torch.tensor(2.0)])
    values.close(2)
    assert values.poll() == [StepValues(1, None, 12.0), StepValues(2, None, 2.0)]


def test_what_was_not_told_is_not_known() -> None:
    values = LateValues()
    values.close(1)
    values.note_losses([torch.tensor(2.0, dtype=torch.float64)])
    values.close(2)
    assert values.poll(wait=True) == [StepValues(2, 2.0, None)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_was_left_out_is_recognised(bad: float) -> None:
    values = LateValues()
    values.note_losses([torch.tensor(bad)])
    values.note_norms([torch.tensor(1.0)])
    values.close(1)
    assert not both_finite(values.poll()[0])
    assert both_finite(StepValues(1, None, 1.0))
    assert not both_finite(StepValues(1, 1.0, bad))
