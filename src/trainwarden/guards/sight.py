"""Whether the hardware can be seen at all: when to say that it cannot, and when not to train blind."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from trainwarden.errors import InvalidSettingError

OnUnreadable = Literal["warn", "abort"]
SightAction = Literal["tell", "back", "abort"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Blindness:
    """Why nothing can be read now. ``tell_after_s``: from when on it is more than a hiccup."""

    reason: str
    tell_after_s: float = 0.0
    final: bool = False
    """Waiting cannot help: there is no device or no driver."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SightState:
    since_s: float | None = None
    told: bool = False


@dataclass(frozen=True, kw_only=True)
class SightPolicy:
    """``warn``: say once that the hardware is unknown, and train on. ``abort``: do not train without its sensors.

    A driver's silence is told at once, but ends a run only after ``grace_s``: a sampling thread that could not run for
    some seconds, or a process that was suspended, looks the same. Raises InvalidSettingError.
    """

    on_unreadable: OnUnreadable = "warn"
    grace_s: float = 20.0

    def __post_init__(self) -> None:
        if self.on_unreadable not in ("warn", "abort"):
            raise InvalidSettingError(setting="on_unreadable", value=self.on_unreadable, expected="'warn' or 'abort'")
        if self.grace_s < 0:
            raise InvalidSettingError(setting="grace_s", value=self.grace_s, expected="0 or more seconds")

    def step(
        self, state: SightState, blindness: Blindness | None, now_s: float
    ) -> tuple[SightState, SightAction | None]:
        """The state now, and what to do. ``None``: something can be read."""
        if blindness is None:
            return SightState(), "back" if state.told else None
        since_s = now_s if state.since_s is None else state.since_s
        state, blind_s = replace(state, since_s=since_s), now_s - since_s
        if self.on_unreadable == "abort" and (blindness.final or blind_s >= self.grace_s):
            return state, "abort"
        if not state.told and blind_s >= blindness.tell_after_s:
            return replace(state, told=True), "tell"
        return state, None
