"""Log lines: means over what was really trained, NaN where nothing was, and the same after a resume."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainwarden.train.metrics import LossHistory, Metrics

NAN, INF = math.nan, math.inf


def metrics(*steps: tuple[float, float]) -> Metrics:
    made = Metrics(clock=iter(range(0, 1000, 2)).__next__)
    made.start_clock()
    for loss, grad_norm in steps:
        made.note_step(torch.tensor(loss), torch.tensor(grad_norm), 10)
    return made


def test_a_window_is_the_mean_of_its_steps_and_the_next_begins_empty() -> None:
    made = metrics((1.0, 2.0), (3.0, 4.0))
    window = made.close_window()
    assert (window.loss, window.grad_norm) == (2.0, 3.0)
    assert window.tokens_per_s == 20 / 2
    assert made.window_is_empty


def test_skipped_steps_are_left_out() -> None:
    made = metrics((1.0, 1.0), (NAN, 1.0), (9.0, INF), (3.0, 1.0))
    assert made.close_window().loss == 2.0
    assert made.history.steps == 2


def test_a_window_of_skipped_steps_is_nan_and_spoils_no_other_figure() -> None:
    made = metrics((2.0, 1.0))
    made.close_window()
    made.note_step(torch.tensor(NAN), torch.tensor(1.0), 10)
    window = made.close_window()
    assert math.isnan(window.loss)
    assert math.isnan(made.history.final)
    assert (made.history.first, made.history.best, made.history.mean) == (2.0, 2.0, 2.0)


def test_tokens_of_skipped_steps_were_processed_all_the_same() -> None:
    assert metrics((NAN, 1.0), (1.0, 1.0)).history.tokens == 20


def test_a_run_that_began_with_nan_has_no_first_loss_but_a_best_one() -> None:
    made = metrics((NAN, 1.0))
    made.close_window()
    made.note_step(torch.tensor(3.0), torch.tensor(1.0), 10)
    made.close_window()
    assert math.isnan(made.history.first or 0.0)
    assert made.history.best == 3.0


def test_a_window_goes_on_after_a_resume() -> None:
    unbroken = metrics((1.0, 1.0), (NAN, 1.0), (5.0, 3.0))
    broken = metrics((1.0, 1.0), (NAN, 1.0))
    resumed = metrics()
    resumed.load_state_dict(broken.state_dict())
    resumed.note_step(torch.tensor(5.0), torch.tensor(3.0), 10)
    assert resumed.close_window().loss == unbroken.close_window().loss
    assert resumed.history == unbroken.history


def test_the_rate_of_a_window_that_was_not_timed_is_unknown() -> None:
    resumed = metrics()
    resumed.load_state_dict(metrics((1.0, 1.0)).state_dict())
    resumed.start_clock()
    assert math.isnan(resumed.close_window().tokens_per_s)


def test_state_is_plain_numbers() -> None:
    state = metrics((1.0, 1.0), (NAN, 2.0)).state_dict()
    assert all(isinstance(value, int | float | list | None) for value in state.values())


def test_saving_does_not_end_the_window() -> None:
    made = metrics((1.0, 1.0), (3.0, 1.0))
    made.state_dict()
    assert made.close_window().loss == 2.0


@given(st.lists(st.lists(st.floats(-1e6, 1e6), max_size=5), min_size=1, max_size=8))
def test_history_agrees_with_all_losses_at_once(lines: list[list[float]]) -> None:
    history = LossHistory()
    means = [history.add_line(line) for line in lines]
    losses = [loss for line in lines for loss in line]
    finite = [mean for mean in means if not math.isnan(mean)]
    assert history.steps == len(losses)
    assert history.mean == pytest.approx(sum(losses) / len(losses), abs=1e-6) if losses else math.isnan(history.mean)
    assert history.best == min(finite) if finite else math.isnan(history.best)
