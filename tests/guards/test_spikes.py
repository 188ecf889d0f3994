"""What is a spike and what is noise, a new level, or not a number."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwarden.errors import InvalidSettingError
from trainwarden.guards.spikes import SignalState, Spike, SpikeDetector, SpikePolicy

POLICY = SpikePolicy()


def noisy(seed: int, count: int, sigma: float, level: Callable[[int], float] = lambda _step: 2.0) -> list[float]:
    drawn = random.Random(seed)
    return [level(step) * math.exp(drawn.gauss(0.0, sigma)) for step in range(count)]


def spikes_in(values: Iterable[float], policy: SpikePolicy = POLICY) -> list[Spike]:
    state, found = SignalState(), []
    for step, value in enumerate(values, start=1):
        state, spike = policy.step(state, "loss", step, value)
        if spike is not None:
            found.append(spike)
    return found


@pytest.mark.parametrize("sigma", [0.0, 0.05, 0.15, 0.3])
def test_lognormal_noise_raises_no_alarm(sigma: float) -> None:
    found = {seed: spikes_in(noisy(seed, 3000, sigma)) for seed in range(4)}
    assert sum(map(len, found.values())) <= (1 if sigma == 0.3 else 0), found


def test_a_loss_that_falls_raises_no_alarm() -> None:
    def falling(step: int) -> float:
        return 0.5 + 9.0 * math.exp(-step / 150)

    assert not any(spikes_in(noisy(seed, 2000, 0.05, falling)) for seed in range(4))


@pytest.mark.parametrize(("factor", "sigma"), [(2.5, 0.05), (5.0, 0.05), (5.0, 0.15)])
def test_eight_steps_above_the_noise_are_one_spike(factor: float, sigma: float) -> None:
    for seed in range(10):
        values = noisy(seed, 600, sigma)
        values[400:408] = [value * factor for value in values[400:408]]
        found = spikes_in(values)
        assert [spike.first_step for spike in found] == [401], (seed, found)
        assert found[0].step <= 403
        assert found[0].usual == pytest.approx(2.0, rel=0.1)


def test_two_of_three_outliers_make_a_spike_one_makes_none() -> None:
    steady = noisy(3, 200, 0.1)
    outlier = 2.0 * math.exp(0.1 * 4.8)
    assert not spikes_in([*steady, outlier, 2.0, 2.0, 2.0, outlier, 2.0, 2.0])
    together = spikes_in([*steady, outlier, 2.0, outlier])
    assert [(spike.first_step, spike.step) for spike in together] == [(201, 203)]


def test_what_is_less_than_a_fifth_above_a_window_without_noise_is_no_spike() -> None:
    still = [1.0] * 100
    assert not spikes_in([*still, 1.19])
    assert [spike.deviations for spike in spikes_in([*still, 1.21])] == [math.inf]


def test_a_value_far_below_is_no_spike() -> None:
    assert not spikes_in([*noisy(0, 200, 0.05), 1e-9, 0.0, -5.0])


def test_a_new_level_is_one_spike_and_then_the_usual() -> None:
    values = [*noisy(1, 200, 0.05), *noisy(2, 400, 0.05, lambda _: 10.0)]
    assert [spike.first_step for spike in spikes_in(values)] == [201]


def test_losses_around_zero_are_judged_without_a_logarithm() -> None:
    drawn = random.Random(4)
    values = [drawn.gauss(0.0, 1.0) for _ in range(300)]
    (spike,) = spikes_in([*values, 30.0])
    assert (spike.step, abs(spike.usual) < 0.3) == (301, True)


@given(st.lists(st.sampled_from([math.nan, math.inf, -math.inf]), max_size=20), st.integers(0, 250))
@settings(deadline=None, max_examples=30)
def test_what_is_not_finite_neither_raises_an_alarm_nor_blinds(bad: list[float], place: int) -> None:
    values = noisy(5, 300, 0.05)
    values[270] *= 5
    expected = [(spike.value, spike.usual) for spike in spikes_in(values)]
    assert len(expected) == 1
    assert [(spike.value, spike.usual) for spike in spikes_in([*values[:place], *bad, *values[place:]])] == expected


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=300))
@settings(deadline=None, max_examples=40)
def test_whatever_comes_the_window_holds_finite_numbers_and_is_bounded(values: list[float]) -> None:
    policy = SpikePolicy(window_values=16, least_values=8, settle_values=5)
    state = SignalState()
    for step, value in enumerate(values):
        state, spike = policy.step(state, "loss", step, value)
        assert len(state.values) <= 16
        assert len(state.outliers) < 5
        assert all(map(math.isfinite, (*state.values, *state.outliers, state.centre, state.scale)))
        assert spike is None or (spike.value == value and spike.first_step <= step)


@given(st.integers(0, 5), st.floats(1e-6, 1e6))
@settings(deadline=None, max_examples=20)
def test_the_unit_of_the_loss_does_not_matter(seed: int, unit: float) -> None:
    values = noisy(seed, 200, 0.1)
    values[150] *= 4
    steps = [spike.step for spike in spikes_in(values)]
    assert [spike.step for spike in spikes_in([value * unit for value in values])] == steps


# -- the two signals of a run ----------------------------------------------------------------------------------------


def test_the_gradient_norm_is_judged_beside_the_loss_and_told_first() -> None:
    detector = SpikeDetector(POLICY)
    for step, (loss, norm) in enumerate(zip(noisy(1, 100, 0.05), noisy(2, 100, 0.05), strict=True), start=1):
        assert not detector.observe(step, loss, norm)
    assert [spike.signal for spike in detector.observe(101, 20.0, 20.0)] == ["grad_norm", "loss"]


def test_a_signal_that_is_not_known_is_left_alone() -> None:
    detector = SpikeDetector(POLICY)
    for step, loss in enumerate(noisy(1, 100, 0.05), start=1):
        detector.observe(step, loss, None)
    assert [spike.signal for spike in detector.observe(101, 20.0, None)] == ["loss"]
    assert set(detector.signals) == {"loss"}


@given(st.integers(1, 199), st.integers(0, 3))
@settings(deadline=None, max_examples=20)
def test_a_resumed_detector_decides_as_an_unbroken_one(cut: int, seed: int) -> None:
    values = noisy(seed, 200, 0.1)
    values[120] *= 4
    values[123] *= 4
    unbroken, begun = SpikeDetector(POLICY), SpikeDetector(POLICY)
    expected = [unbroken.observe(step, value, 2 * value) for step, value in enumerate(values)]
    found = [begun.observe(step, value, 2 * value) for step, value in enumerate(values[:cut])]
    resumed = SpikeDetector(POLICY)
    resumed.load_state_dict(json.loads(json.dumps(begun.state_dict())))
    found += [resumed.observe(step, value, 2 * value) for step, value in enumerate(values[cut:], start=cut)]
    assert found == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"action": "skip"},
        {"least_values": 4},
        {"least_values": 200},
        {"outlier_deviations": 0.0},
        {"outlier_deviations": 9.0},
        {"least_factor": 1.0},
        {"settle_values": 1},
    ],
)
def test_a_policy_that_contradicts_itself_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidSettingError, match=r"spikes\."):
        SpikePolicy(**wrong)
