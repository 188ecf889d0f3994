"""What the hardware guard's findings become: events for people, errors for the run, and their order."""

from __future__ import annotations

from trainwarden.device import Missing, Reading, known
from trainwarden.device.reading import SENSORS
from trainwarden.errors import GPUError, GPUMonitoringError, GPUTemperatureError
from trainwarden.events import DeviceUnhealthy, Notice, SensorsBack, SensorsSilent
from trainwarden.guards.decisions import Abort, Decision, Warn
from trainwarden.guards.health import Finding
from trainwarden.guards.sight import Blindness, SightAction, SightState

_HICCUP_S = 2.0


def describe_heat(reading: Reading) -> str:
    """Temperature and distance to the limit in words, with what they rest on when that is doubtful."""
    degrees, headroom, reasons = reading.temperature_c, reading.headroom_c, reading.clocks_event_reasons
    words = [] if isinstance(degrees, Missing) else [f"{degrees:.0f} °C"]
    if not isinstance(headroom, Missing):
        words.append(f"{abs(headroom):.0f} °C {'below' if headroom >= 0 else 'above'} its limit")
    if not isinstance(reasons, Missing) and "hw_thermal_slowdown" in reasons.names:
        words.append("slowed down by its hardware for heat")
    if reading.headroom_source == "assumed":
        words.append("a limit that is assumed since the device states none")
    return ", ".join(words) or "its temperature cannot be read"


def unguarded(reading: Reading) -> str:
    """What to say once when a device gives no headroom."""
    missing = reading.headroom_c
    reason = missing.reason if isinstance(missing, Missing) else ""
    rest = "heat is unknown"
    if not isinstance(reading.clocks_event_reasons, Missing):
        rest = "only its thermal slowdown flag is watched"
    return f"the temperature of GPU {reading.index} cannot be read ({reason}): {rest}"


def too_hot(reading: Reading, text: str, paused_s: float | None, *, silent: bool) -> GPUTemperatureError:
    """The error of a pause that did not help, or (``paused_s`` is None) of a device at its slowdown threshold."""
    when = "at its slowdown threshold" if paused_s is None else f"after a pause of {paused_s:.0f} s"
    return GPUTemperatureError(
        device=reading.index,
        uuid=reading.uuid,
        temperature_c=None if silent else known(reading.temperature_c),
        headroom_c=None if silent else known(reading.headroom_c),
        paused_s=paused_s,
        problem=f"{text}, {when}",
    )


def blindness_of(reading: Reading) -> Blindness | None:
    """Why nothing at all can be read of a device; ``None`` when something can."""
    # The first test alone decides in nearly all cases; this runs at every step boundary.
    if not isinstance(reading.temperature_c, Missing):
        return None
    missing = reading.missing()
    if len(missing) < len(SENSORS):
        return None
    return Blindness(reason=missing["temperature_c"].reason, tell_after_s=_HICCUP_S)


def sight_decisions(
    index: int | None,
    before: SightState,
    blindness: Blindness | None,
    action: SightAction | None,
    now_s: float,
    step: int,
) -> list[Decision]:
    """What is told of a device (``None``: of all) that cannot be read, or can be again."""
    if action == "abort" and blindness is not None:
        return [Abort(_unseen(index, blindness.reason), save_first=True)]
    if action == "tell" and blindness is not None:
        if blindness.final:
            return [Warn(Notice(step=step, text=f"the state of the hardware is unknown: {blindness.reason}"))]
        return [Warn(SensorsSilent(step=step, device=index, reason=blindness.reason))]
    if action == "back":
        return [Warn(SensorsBack(step=step, device=index, silent_s=now_s - (before.since_s or 0.0)))]
    return []


def _unseen(index: int | None, reason: str) -> GPUMonitoringError:
    return GPUMonitoringError(device=index, problem=reason)


def health_decisions(reading: Reading | None, finding: Finding, step: int) -> list[Decision]:
    """What is told of a finding, and the end of the run when it is one that ends it. ``None``: no device is named."""
    index = reading.index if reading else None
    event = DeviceUnhealthy(
        step=step,
        device=index,
        condition=finding.condition,
        action=finding.action,
        xid=finding.xid,
        problem=finding.problem,
    )
    if finding.severity == "record":
        place = "a GPU" if index is None else f"GPU {index}"
        return [Warn(Notice(step=step, text=f"{finding.problem} on {place}: recorded, nothing to do"))]
    if finding.severity == "warn":
        return [Warn(event)]
    return [Warn(event), Abort(_failed(reading, finding), save_first=finding.memory_trusted)]


def _failed(reading: Reading | None, finding: Finding) -> GPUError:
    return GPUError(
        device=reading.index if reading else None,
        uuid=reading.uuid if reading else None,
        condition=finding.condition,
        action=finding.action,
        xid=finding.xid,
        problem=finding.problem,
    )


def in_order(found: list[Decision]) -> list[Decision]:
    """As found; but when the run must end, only what is told, and of several reasons the gravest."""
    aborts = [each for each in found if isinstance(each, Abort)]
    if not aborts:
        return found
    gravest = max(aborts, key=_gravity)
    told: list[Decision] = [each for each in found if isinstance(each, Warn)]
    return [*told, Abort(gravest.error, save_first=all(each.save_first for each in aborts))]


def _gravity(abort: Abort) -> int:
    order = (GPUMonitoringError, GPUTemperatureError, GPUError)
    return order.index(type(abort.error))
