"""How far a GPU is from its own limit: a pure decision over what the device states about itself.

In order of trust: the T.Limit margin, the device's absolute thresholds, and, only when it states nothing, an
assumed limit that is said to be assumed. Margins at or below zero are doubted (some parts report them while
cool) unless the clocks confirm heat; thresholds are checked for range and order (laptops report a "maximum"
of 57 °C).
"""

from __future__ import annotations

from dataclasses import dataclass

from .reading import HeadroomSource
from .values import Missing, Unknown, Value

ASSUMED_MAX_C = 83.0
"""Highest operating temperature assumed of a device that states none: the lowest of data-centre parts."""
SLOWDOWN_GAP_C = 5.0
"""Distance kept below a slowdown threshold when the device states no highest operating temperature."""
SHUTDOWN_GAP_C = 10.0
DISAGREEMENT_C = 15.0
"""Margin and thresholds farther apart than this contradict each other."""

_PLAUSIBLE_LIMIT_C = (60.0, 120.0)
_PLAUSIBLE_TEMPERATURE_C = (-40.0, 150.0)
_WIDEST_GAP_C = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Thermals:
    """What the device says about heat. ``slowdown_offset_c`` is the margin at which hardware slows down."""

    temperature_c: Value[float]
    margin_c: Value[float]
    slowdown_offset_c: Value[float]
    gpu_max_c: Value[float]
    slowdown_c: Value[float]
    shutdown_c: Value[float]
    heat_confirmed: bool
    """A thermal clocks-event reason is active."""


@dataclass(frozen=True, slots=True)
class Headroom:
    headroom_c: Value[float]
    slowdown_headroom_c: Value[float]
    source: HeadroomSource
    note: str


@dataclass(frozen=True, slots=True)
class _Limit:
    max_c: float
    slowdown_c: float | None
    source: HeadroomSource
    note: str


def plausible_temperature(value: Value[float]) -> Value[float]:
    """A temperature outside −40…150 °C is a broken sensor, not a temperature."""
    low, high = _PLAUSIBLE_TEMPERATURE_C
    if isinstance(value, Missing) or low <= value <= high:
        return value
    return Unknown(f"the sensor reports an impossible {value:.0f} °C")


def decide_headroom(thermals: Thermals) -> Headroom:
    """The distance to the highest operating temperature and to hardware slowdown, and their source."""
    margin, temperature = thermals.margin_c, plausible_temperature(thermals.temperature_c)
    if isinstance(temperature, Missing):
        if isinstance(margin, Missing):
            return Headroom(temperature, temperature, "none", f"no temperature: {temperature.reason}")
        return _by_margin(thermals, margin)
    limit = _limit(thermals)
    if isinstance(margin, Missing):
        return _by_limit(temperature, limit, f"no margin ({margin.reason})")
    doubt = _doubt(thermals, margin, temperature, limit)
    return _by_limit(temperature, limit, doubt) if doubt else _by_margin(thermals, margin)


def _doubt(thermals: Thermals, margin: float, temperature: float, limit: _Limit) -> str:
    """Why the thresholds are believed rather than the margin; empty when the margin stands."""
    by_limit = limit.max_c - temperature
    if margin <= 0 and not thermals.heat_confirmed and by_limit > DISAGREEMENT_C:
        return f"a margin of {margin:.0f} °C at {temperature:.0f} °C is not credible"
    stated = limit.slowdown_c is not None
    if stated and by_limit < margin - DISAGREEMENT_C and temperature >= (limit.slowdown_c or 0.0):
        return f"{temperature:.0f} °C is above the slowdown threshold, against a margin of {margin:.0f} °C"
    return ""


def _by_margin(thermals: Thermals, margin: float) -> Headroom:
    offset = thermals.slowdown_offset_c
    # Offsets are 0 or a few degrees below: -2 on H100, -3 on B200. Without one, assume the device slows at 0.
    credible = not isinstance(offset, Missing) and -_WIDEST_GAP_C <= offset <= 0
    slowdown = margin - offset if credible and not isinstance(offset, Missing) else margin
    return Headroom(margin, slowdown, "margin", "")


def _by_limit(temperature: float, limit: _Limit, doubt: str) -> Headroom:
    slowdown: Value[float] = Unknown("the device states no slowdown temperature")
    if limit.slowdown_c is not None:
        slowdown = limit.slowdown_c - temperature
    note = f"{doubt}; {limit.note}" if limit.note else doubt
    return Headroom(limit.max_c - temperature, slowdown, limit.source, note)


def _limit(thermals: Thermals) -> _Limit:
    """The highest operating temperature by the most direct threshold that makes sense beside the others."""
    shutdown = _plausible_limit(thermals.shutdown_c)
    slowdown = _plausible_limit(thermals.slowdown_c)
    gpu_max = _plausible_limit(thermals.gpu_max_c)
    if slowdown is not None and shutdown is not None and slowdown > shutdown:
        slowdown = None
    ceiling = slowdown if slowdown is not None else shutdown
    if gpu_max is not None and (ceiling is None or ceiling - _WIDEST_GAP_C <= gpu_max <= ceiling):
        return _Limit(gpu_max, slowdown, "gpu_max", "")
    if slowdown is not None:
        note = f"no credible maximum: {SLOWDOWN_GAP_C:.0f} °C below the slowdown threshold of {slowdown:.0f} °C"
        return _Limit(slowdown - SLOWDOWN_GAP_C, slowdown, "slowdown", note)
    if shutdown is not None:
        note = f"no credible slowdown threshold: {SHUTDOWN_GAP_C:.0f} °C below shutdown at {shutdown:.0f} °C"
        return _Limit(shutdown - SHUTDOWN_GAP_C, None, "shutdown", note)
    note = f"the device states no credible limit: {ASSUMED_MAX_C:.0f} °C is assumed"
    return _Limit(ASSUMED_MAX_C, None, "assumed", note)


def _plausible_limit(value: Value[float]) -> float | None:
    low, high = _PLAUSIBLE_LIMIT_C
    return value if not isinstance(value, Missing) and low <= value <= high else None
