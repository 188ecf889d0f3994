"""Spikes of the loss and of the gradient norm, told from their own noise by robust statistics.

A value is judged by its distance to the median of the window before it, in units of the window's scale (1.4826 times
the median absolute deviation, which is the standard deviation of normal noise), on the logarithm: losses and norms
spread by factors. Median and deviation stand half of the window being wrong, and neither outliers nor non-finite values
ever enter it: a mean would follow the spike, and a single NaN would blind it for ever.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

from trainwarden.guards.settings import require

_require = partial(require, "spikes")

SpikeAction = Literal["announce", "rollback", "abort"]
Signal = Literal["loss", "grad_norm"]

_NORMAL_SCALE = 1.4826
_CALM_VALUES = 2
_REFRESH_VALUES = 8
"""The statistics of a window are taken anew after so many new values: between two, they hardly change."""


@dataclass(frozen=True)
class Spike:
    """A value far above its window. ``first_step``: where the excursion began, which may be some steps before."""

    signal: Signal
    step: int
    first_step: int
    value: float
    usual: float
    """Median of the window."""
    deviations: float


@dataclass(frozen=True)
class SignalState:
    """What is remembered of one signal."""

    values: tuple[float, ...] = ()
    """Ordinary values, the newest last."""
    logarithmic: bool = True
    """Whether centre and scale are those of the logarithms: not where the window holds a value of 0 or less."""
    centre: float = 0.0
    scale: float = 0.0
    since_refresh: int = 0
    outliers: tuple[float, ...] = ()
    """Values above the window in this excursion, the newest last."""
    calm: int = 0
    """Ordinary values since the last outlier."""
    first_outlier_step: int = 0
    told: bool = False
    """Whether this excursion was reported."""

    @property
    def usual(self) -> float:
        """Median of the window."""
        return math.exp(self.centre) if self.logarithmic else self.centre


@dataclass(frozen=True)
class SpikePolicy:
    """When a loss or gradient norm is a spike, and what is done about it.

    The thresholds are those that a simulation (3,000 steps of lognormal noise, 30 seeds) found to raise no false alarm
    at 5, 15 and 30 % noise: one value ``spike_deviations`` above the median, or two of three values above
    ``outlier_deviations``. ``least_factor``: however quiet the window, less than this times the median is no spike.
    An excursion that stays for ``settle_values`` is the new level, and no spike any more.

    ``action``: ``announce`` tells it; ``rollback`` goes back to before it and leaves its batches out; ``abort`` ends
    the run. Raises InvalidSettingError for values that contradict each other.
    """

    action: SpikeAction = "announce"
    window_values: int = 128
    least_values: int = 32
    outlier_deviations: float = 4.0
    spike_deviations: float = 6.0
    least_factor: float = 1.2
    settle_values: int = 32

    def __post_init__(self) -> None:
        _require(self.action in ("announce", "rollback", "abort"), "action", self.action, "announce, rollback or abort")
        ordered = 8 <= self.least_values <= self.window_values
        _require(ordered, "least_values", self.least_values, f"8 to window_values ({self.window_values})")
        ordered = 0 < self.outlier_deviations <= self.spike_deviations
        _require(ordered, "outlier_deviations", self.outlier_deviations, "above 0, at most spike_deviations")
        _require(self.least_factor > 1, "least_factor", self.least_factor, "above 1")
        _require(self.settle_values >= 3, "settle_values", self.settle_values, "at least 3")

    def step(self, state: SignalState, signal: Signal, step: int, value: float) -> tuple[SignalState, Spike | None]:
        """The state after the value of ``step``, and the spike that it shows; each excursion is shown once.

        A value that is not finite says nothing here: it is the finite guard's.
        """
        if not math.isfinite(value):
            return state, None
        if len(state.values) < self.least_values:
            return self._admit(state, value), None
        deviations = self._deviations(state, value)
        if deviations < self.outlier_deviations:
            return self._admit(_calmed(state) if state.outliers else state, value), None
        first = state.first_outlier_step if state.outliers else step
        state = replace(state, outliers=(*state.outliers, value), first_outlier_step=first, calm=0)
        if len(state.outliers) >= self.settle_values:
            return _refreshed(SignalState(state.outliers[-self.window_values :])), None
        if state.told or (deviations < self.spike_deviations and len(state.outliers) < 2):
            return state, None
        return replace(state, told=True), Spike(signal, step, first, value, state.usual, deviations)

    def _deviations(self, state: SignalState, value: float) -> float:
        """How far above the window ``value`` lies; 0 where it is less than ``least_factor`` above."""
        usual = state.usual
        if value <= usual + (self.least_factor - 1) * abs(usual):
            return 0.0
        distance = (math.log(value) if state.logarithmic else value) - state.centre
        return distance / state.scale if state.scale else math.inf

    def _admit(self, state: SignalState, value: float) -> SignalState:
        values = (*state.values[-self.window_values + 1 :], value)
        due = state.since_refresh + 1 >= _REFRESH_VALUES or len(values) == self.least_values
        state = replace(state, values=values, since_refresh=state.since_refresh + 1)
        return _refreshed(state) if due else state


@dataclass
class SpikeDetector:
    """Both signals of one run. `observe` is called once a step, in order, some steps late."""

    policy: SpikePolicy
    signals: dict[Signal, SignalState] = field(default_factory=dict)

    def observe(self, step: int, loss: float | None, grad_norm: float | None) -> list[Spike]:
        """The spikes that the values of ``step`` show; ``None`` for a value that is not known.

        The gradient norm comes first: it usually moves before the loss does.
        """
        seen: tuple[tuple[Signal, float | None], ...] = (("grad_norm", grad_norm), ("loss", loss))
        found = []
        for signal, value in seen:
            if value is None:
                continue
            state = self.signals.get(signal, SignalState())
            self.signals[signal], spike = self.policy.step(state, signal, step, value)
            if spike is not None:
                found.append(spike)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: a resumed run decides as an unbroken one would."""
        return {signal: asdict(state) for signal, state in self.signals.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.signals = {signal: _state_from(one) for signal, one in state.items()}  # type: ignore[misc]


def _state_from(saved: Mapping[str, Any]) -> SignalState:
    return SignalState(**{**saved, "values": tuple(saved["values"]), "outliers": tuple(saved["outliers"])})


def _calmed(state: SignalState) -> SignalState:
    """After an ordinary value; two in a row end an excursion."""
    over = state.calm + 1 >= _CALM_VALUES
    return replace(state, outliers=(), calm=0, told=False) if over else replace(state, calm=state.calm + 1)


def _refreshed(state: SignalState) -> SignalState:
    values = sorted(state.values)
    logarithmic = values[0] > 0
    if logarithmic:
        values = [math.log(value) for value in values]
    centre = _median(values)
    scale = _NORMAL_SCALE * _median(sorted(abs(value - centre) for value in values))
    return replace(state, logarithmic=logarithmic, centre=centre, scale=scale, since_refresh=0)


def _median(ordered: Sequence[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
