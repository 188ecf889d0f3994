"""Heat: when to warn, to pause, to go on, and to end the run. One machine for each device.

Heat is judged by the distance to the device's own limit, or by the clocks' HW-thermal flag; memory plays no part in it.

A sample without a reading is neither hot nor cool. It ends every count towards "cool"; counts towards "warm" and "hot"
survive a gap of two such samples, so that a sensor with hiccups cannot hide heat, and are forgotten after a longer
one. During a pause this means: the sensor that caused it must be read again, and be cool, and no other may say hot,
before training goes on. One that stays away neither resumes nor hangs the run: ``max_pause_s`` ends the pause anyway.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from trainwarden.device import Missing, Reading
from trainwarden.errors import InvalidSettingError

ThermalAction = Literal["warn", "clear", "blind", "pause", "resume", "give_up", "abort"]
"""``blind``: no headroom can be read (told once); ``give_up``: the pause has lasted too long; ``abort``: the hardware
slows itself down."""
ThermalCause = Literal["headroom", "flag"]

_HW_THERMAL_SLOWDOWN = 0x40
_BRIDGED_GAP = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Heat:
    """What one sample says of the heat of one device, in °C; ``None`` is what could not be read."""

    headroom_c: float | None
    slowdown_headroom_c: float | None = None
    hw_thermal: bool | None = None
    """Whether the hardware slows the clocks down for heat."""

    @classmethod
    def of(cls, reading: Reading) -> Heat:
        """The part of ``reading`` that this machine looks at."""
        reasons = reading.clocks_event_reasons
        return cls(
            headroom_c=None if isinstance(reading.headroom_c, Missing) else reading.headroom_c,
            slowdown_headroom_c=None
            if isinstance(reading.slowdown_headroom_c, Missing)
            else reading.slowdown_headroom_c,
            hw_thermal=None if isinstance(reasons, Missing) else bool(reasons.raw & _HW_THERMAL_SLOWDOWN),
        )


UNREAD = Heat(headroom_c=None)
"""A sample that says nothing, or silence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ThermalState:
    """What is remembered of the samples so far. Each count is of samples in a row."""

    warned: bool = False
    blind_told: bool = False
    paused_at_s: float | None = None
    cause: ThermalCause = "headroom"
    """Of the pause that lasts, or the last one."""
    warm: int = 0
    clear: int = 0
    hot: int = 0
    critical: int = 0
    cool: int = 0
    unread: int = 0
    flags: tuple[bool, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ThermalPolicy:
    """Thresholds are °C of headroom: 0 is the device's highest operating temperature.

    Defaults follow NVIDIA's T.Limit semantics. A device that states no slowdown threshold is never aborted by a guessed
    one. Raises InvalidSettingError for thresholds that contradict each other.
    """

    warn_headroom_c: float = 10.0
    clear_headroom_c: float = 15.0
    pause_headroom_c: float = 3.0
    resume_headroom_c: float = 20.0
    warn_samples: int = 3
    """In a row, for a warning and for its end."""
    pause_samples: int = 2
    flag_samples: int = 3
    """HW-thermal flags among the last ``flag_window`` samples that pause too."""
    flag_window: int = 5
    resume_samples: int = 3
    abort_samples: int = 2
    min_pause_s: float = 30.0
    """A hot spot that only the flag shows cools in a moment: going on at once would pause again at once."""
    max_pause_s: float = 180.0

    def __post_init__(self) -> None:
        ordered = (
            self.pause_headroom_c <= self.warn_headroom_c < self.clear_headroom_c
            and self.pause_headroom_c < self.resume_headroom_c
        )
        if not ordered:
            shown = "/".join(f"{getattr(self, f.name):g}" for f in fields(self)[:4])
            raise InvalidSettingError(
                setting="thermal",
                value=f"warn/clear/pause/resume {shown}",
                expected="pause <= warn < clear, pause < resume",
            )
        if not 0 <= self.min_pause_s < self.max_pause_s:
            value = f"min_pause_s {self.min_pause_s:g}, max_pause_s {self.max_pause_s:g}"
            raise InvalidSettingError(setting="thermal", value=value, expected="0 <= min_pause_s < max_pause_s")
        counts = {f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith(("_samples", "_window"))}
        for name, count in counts.items():
            if count < 1:
                raise InvalidSettingError(setting=f"thermal.{name}", value=count, expected="at least 1")

    def step(self, state: ThermalState, heat: Heat | None, now_s: float) -> tuple[ThermalState, ThermalAction | None]:
        """The state after ``heat``, and what to do. ``None``: no new sample, only time has passed."""
        if heat is not None:
            state = self._count(state, heat)
            if state.critical >= self.abort_samples:
                return state, "abort"
        if state.paused_at_s is not None:
            return self._in_pause(state, now_s - state.paused_at_s)
        return (state, None) if heat is None else self._in_training(state, now_s)

    def _in_pause(self, state: ThermalState, paused_s: float) -> tuple[ThermalState, ThermalAction | None]:
        if state.cool >= self.resume_samples and paused_s >= self.min_pause_s:
            return replace(state, paused_at_s=None, hot=0, flags=(), warned=state.clear < self.warn_samples), "resume"
        return state, "give_up" if paused_s >= self.max_pause_s else None

    def _in_training(self, state: ThermalState, now_s: float) -> tuple[ThermalState, ThermalAction | None]:
        hot = state.hot >= self.pause_samples
        if hot or sum(state.flags) >= self.flag_samples:
            cause: ThermalCause = "headroom" if hot else "flag"
            return replace(state, paused_at_s=now_s, cause=cause, warned=True, cool=0), "pause"
        if not state.warned and state.warm >= self.warn_samples:
            return replace(state, warned=True), "warn"
        if state.warned and state.clear >= self.warn_samples:
            return replace(state, warned=False), "clear"
        if not state.blind_told and state.unread > _BRIDGED_GAP:
            return replace(state, blind_told=True), "blind"
        return state, None

    def _count(self, state: ThermalState, heat: Heat) -> ThermalState:
        slowdown, headroom = heat.slowdown_headroom_c, heat.headroom_c
        state = replace(
            state,
            flags=(*state.flags, heat.hw_thermal is True)[-self.flag_window :],
            cool=state.cool + 1 if self._is_cool(state.cause, heat) else 0,
            critical=state.critical + 1 if slowdown is not None and slowdown <= 0 else 0,
        )
        if headroom is None:
            unread = state.unread + 1
            forget = unread > _BRIDGED_GAP
            return replace(
                state, unread=unread, clear=0, warm=0 if forget else state.warm, hot=0 if forget else state.hot
            )
        return replace(
            state,
            unread=0,
            blind_told=False,
            warm=state.warm + 1 if headroom <= self.warn_headroom_c else 0,
            clear=state.clear + 1 if headroom >= self.clear_headroom_c else 0,
            hot=state.hot + 1 if headroom <= self.pause_headroom_c else 0,
        )

    def _is_cool(self, cause: ThermalCause, heat: Heat) -> bool:
        if heat.headroom_c is None:
            return cause == "flag" and heat.hw_thermal is False
        if heat.hw_thermal is None and cause == "flag":
            return False
        return heat.headroom_c >= self.resume_headroom_c and heat.hw_thermal is not True
