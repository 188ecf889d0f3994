"""When a bad step is skipped and when skipping has gone on for too long."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwarden.errors import InvalidSettingError
from trainwarden.guards.finite import (
    NONE_SKIPPED,
    Culprit,
    FinitePolicy,
    FiniteVerdict,
    SkippedSteps,
    StepFindings,
)

GOOD = StepFindings()
BAD_LOSS = StepFindings(loss_finite=False, gradients_finite=False)
BAD_GRADIENT = StepFindings(gradients_finite=False)
SEARCHING = StepFindings(gradients_finite=False, loss_scale=2.0**14)

STEPS = st.lists(st.sampled_from([GOOD, BAD_LOSS, BAD_GRADIENT]), max_size=60)


def history_of(policy: FinitePolicy, steps: list[StepFindings]) -> SkippedSteps:
    history = NONE_SKIPPED
    for step, findings in enumerate(steps, start=1):
        history = policy.after(history, step, findings)
    return history


def first_verdict(policy: FinitePolicy, steps: list[StepFindings]) -> tuple[int, FiniteVerdict] | None:
    history = NONE_SKIPPED
    for step, findings in enumerate(steps, start=1):
        history = policy.after(history, step, findings)
        verdict = policy.verdict(history, step, findings)
        if verdict is not None:
            return step, verdict
    return None


def test_a_bad_loss_is_named_before_the_gradients_it_spoils() -> None:
    assert (GOOD.what, BAD_LOSS.what, BAD_GRADIENT.what) == (None, "loss", "gradient")


@given(STEPS)
def test_the_streak_counts_bad_steps_in_a_row_and_only_those(steps: list[StepFindings]) -> None:
    history = history_of(FinitePolicy(), steps)
    trailing = 0
    while trailing < len(steps) and steps[-1 - trailing].what is not None:
        trailing += 1
    assert history.streak == trailing
    if trailing:
        assert history.streak_began == len(steps) - trailing + 1


@given(STEPS, st.integers(0, 6))
def test_the_run_ends_at_the_first_streak_above_the_limit(steps: list[StepFindings], most: int) -> None:
    found = first_verdict(FinitePolicy(most, max_skipped_share=None), steps)
    bad = [findings.what is not None for findings in steps]
    ends = [step for step in range(most + 1, len(bad) + 1) if all(bad[step - most - 1 : step])]
    if not ends:
        assert found is None
    else:
        assert found == (ends[0], FiniteVerdict("abort", "streak", ends[0] - most))


@given(STEPS, st.sampled_from([0.1, 0.25, 0.5, 1.0]), st.integers(1, 30))
def test_the_run_ends_at_the_first_window_with_too_large_a_share(
    steps: list[StepFindings], share: float, window: int
) -> None:
    policy = FinitePolicy(10**6, max_skipped_share=share, share_window_steps=window)
    found = first_verdict(policy, steps)
    bad = [step for step, findings in enumerate(steps, start=1) if findings.what is not None]
    ends = [step for step in bad if sum(step - window < other <= step for other in bad) > share * window]
    assert (None if found is None else found[0]) == (ends[0] if ends else None)
    if found is not None:
        assert found[1].limit == "share"
        assert found[1].first_step == min(other for other in bad if other > ends[0] - window)


@given(STEPS)
def test_to_abort_is_to_end_at_the_first_bad_step(steps: list[StepFindings]) -> None:
    found = first_verdict(FinitePolicy(action="abort"), steps)
    first = next((step for step, findings in enumerate(steps, start=1) if findings.what), None)
    assert found == (None if first is None else (first, FiniteVerdict("abort", "first", first)))


@given(STEPS, st.integers(0, 4))
def test_a_rollback_comes_where_skipping_would_have_ended_the_run(steps: list[StepFindings], most: int) -> None:
    back, end = (first_verdict(FinitePolicy(most, action), steps) for action in ("rollback", "skip"))
    assert (back is None) == (end is None)
    if back is not None and end is not None:
        assert back[0] == end[0]
        assert (back[1].action, end[1].action) == ("rollback", "abort")
        assert back[1].first_step == end[1].first_step


def test_zero_allowed_skips_end_the_run_at_the_first_bad_step() -> None:
    assert first_verdict(FinitePolicy(0), [GOOD, BAD_GRADIENT]) == (2, FiniteVerdict("abort", "streak", 2))


@given(STEPS)
def test_a_healthy_history_is_never_copied(steps: list[StepFindings]) -> None:
    history = history_of(FinitePolicy(), [*steps, GOOD])
    assert FinitePolicy().after(history, 99, GOOD) is history


# -- a GradScaler ----------------------------------------------------------------------------------------------------


def test_a_grad_scaler_that_searches_its_scale_is_not_held_against_the_run() -> None:
    policy = FinitePolicy(2)
    history = SkippedSteps(1, 3, (3,))
    assert policy.after(history, 4, SEARCHING) is history
    assert policy.verdict(history, 4, SEARCHING) is None


def test_a_grad_scaler_at_the_bottom_of_its_scale_is() -> None:
    bottom = StepFindings(gradients_finite=False, loss_scale=1.0)
    assert FinitePolicy(2).after(SkippedSteps(1, 3, (3,)), 4, bottom).streak == 2


def test_a_non_finite_loss_counts_whatever_the_scale() -> None:
    bad = StepFindings(loss_finite=False, loss_scale=2.0**14)
    assert FinitePolicy(2).after(SkippedSteps(1, 3, (3,)), 4, bad).streak == 2


@given(st.integers(0, 200))
def test_no_search_however_long_ends_a_run(count: int) -> None:
    assert first_verdict(FinitePolicy(0, "abort"), [SEARCHING] * count) is None


# -- several optimizers, late verdicts -------------------------------------------------------------------------------


def test_a_step_is_counted_once_whoever_reports_it_and_whenever() -> None:
    policy = FinitePolicy()
    history = policy.after(NONE_SKIPPED, 7, BAD_LOSS)
    assert policy.after(history, 7, BAD_GRADIENT) is history
    assert policy.after(history, 7, GOOD) is history, "one of two optimizers was fine: the step was bad all the same"
    assert policy.after(history, 8, GOOD).streak == 0


def test_the_findings_of_two_optimizers_are_one_step() -> None:
    culprit = Culprit("a.weight", "nan")
    merged = StepFindings(culprit=culprit).merged(BAD_LOSS).merged(StepFindings(applied=True))
    assert (merged.what, merged.culprit, merged.applied) == ("loss", culprit, True)


@pytest.mark.parametrize("action", ["rollback", "abort"])
def test_a_step_that_reached_the_weights_is_never_one_to_skip(action: Any) -> None:
    policy = FinitePolicy(5, action, detection="late")
    spoiled = StepFindings(gradients_finite=False, applied=True)
    assert policy.verdict(policy.after(NONE_SKIPPED, 4, spoiled), 4, spoiled) == FiniteVerdict(action, "late", 4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_skipped_in_a_row": -1},
        {"action": "ignore"},
        {"max_skipped_share": 0.0},
        {"max_skipped_share": 1.5},
        {"share_window_steps": 0},
        {"detection": "never"},
        {"detection": "late"},
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidSettingError, match=r"finite\."):
        FinitePolicy(**wrong)
