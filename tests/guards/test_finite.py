"""When a bad step is skipped and when skipping has gone on for too long."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trainwarden.guards.finite import FinitePolicy, StepFindings

GOOD = StepFindings()
BAD_LOSS = StepFindings(loss_finite=False, gradients_finite=False)
BAD_GRADIENT = StepFindings(gradients_finite=False)


def test_a_bad_loss_is_named_before_the_gradients_it_spoils() -> None:
    assert (GOOD.what, BAD_LOSS.what, BAD_GRADIENT.what) == (None, "loss", "gradient")


@given(st.lists(st.sampled_from([GOOD, BAD_LOSS, BAD_GRADIENT]), max_size=40), st.integers(0, 6))
def test_the_streak_counts_bad_steps_in_a_row_and_only_those(steps: list[StepFindings], most: int) -> None:
    policy = FinitePolicy(most)
    streak = 0
    for index, findings in enumerate(steps):
        streak = policy.next_streak(streak, findings)
        trailing = 0
        while trailing <= index and steps[index - trailing].what is not None:
            trailing += 1
        assert streak == trailing
        assert policy.exhausted(streak) == (trailing > most)


def test_zero_allowed_skips_end_the_run_at_the_first_bad_step() -> None:
    policy = FinitePolicy(0)
    assert policy.exhausted(policy.next_streak(0, BAD_GRADIENT))


def test_a_grad_scaler_that_searches_its_scale_is_not_held_against_the_run() -> None:
    policy = FinitePolicy(2)
    searching = StepFindings(gradients_finite=False, loss_scale=2.0**14)
    assert policy.next_streak(1, searching) == 1


def test_a_grad_scaler_at_the_bottom_of_its_scale_is() -> None:
    policy = FinitePolicy(2)
    assert policy.next_streak(1, StepFindings(gradients_finite=False, loss_scale=1.0)) == 2


def test_a_non_finite_loss_counts_whatever_the_scale() -> None:
    policy = FinitePolicy(2)
    assert policy.next_streak(1, StepFindings(loss_finite=False, loss_scale=2.0**14)) == 2
