"""One device at one moment: the `Device` protocol, its frozen `Reading`, and the small values inside it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from .values import Missing, Unknown, Unsupported, Value

HeadroomSource = Literal["margin", "gpu_max", "slowdown", "shutdown", "assumed", "none"]
MemorySource = Literal["device", "host"]

# nvml.h, nvmlClocksEventReason* and the two older nvmlClocksThrottleReason* bits.
_REASON_NAMES = {
    0x1: "gpu_idle",
    0x2: "applications_clocks_setting",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
    0x200: "board_limit",
    0x400: "reliability",
}
_RECOVERY_NAMES = (
    "none",
    "gpu_reset",
    "node_reboot",
    "drain_p2p",
    "drain_and_reset",
    "recover_imex_domain",
    "bus_reset",
    "system_reboot",
)
_GPU_IS_LOST = 15
_RESET_REQUIRED = 16


@dataclass(frozen=True, slots=True)
class ClocksEventReasons:
    """Why the clocks are not at their maximum: NVML's bit mask and its names.

    ``hw_slowdown`` alone may flash while the performance state changes: debounce it.
    """

    raw: int
    names: frozenset[str]

    @classmethod
    def decode(cls, raw: int) -> ClocksEventReasons:
        """Every set bit by name; one without a name here by its value (``bit_0x800``)."""
        bits = (1 << position for position in range(raw.bit_length()) if raw >> position & 1)
        return cls(raw, frozenset(_REASON_NAMES.get(bit, f"bit_{bit:#x}") for bit in bits))

    @property
    def thermal(self) -> bool:
        """Whether heat, by the software's or the hardware's judgement, holds the clocks down."""
        return bool(self.raw & 0x60)

    def __str__(self) -> str:
        return ", ".join(sorted(self.names)) or "none"


@dataclass(frozen=True, slots=True)
class RemappedRows:
    """Rows of device memory replaced by spares. ``pending`` asks for a reset, ``failed`` for another card."""

    corrected: int
    uncorrected: int
    pending: bool
    failed: bool


@dataclass(frozen=True, slots=True)
class RecoveryAction:
    """What the driver (570 and newer) asks for before the GPU can be trusted again."""

    code: int
    name: str

    @classmethod
    def decode(cls, code: int) -> RecoveryAction:
        """The action by name; a code newer than this table is still an action (``action_9``), not health."""
        return cls(code, _RECOVERY_NAMES[code] if 0 <= code < len(_RECOVERY_NAMES) else f"action_{code}")

    @property
    def needed(self) -> bool:
        return self.code != 0

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, kw_only=True)
class Reading:
    """All that one device said at one moment. A field that could not be read holds the reason."""

    index: int
    """The device as torch numbers it (``cuda:index``)."""
    uuid: str
    name: str
    taken_at_s: float
    """Monotonic clock, when the fast sensors were read."""
    health_taken_at_s: float
    """Monotonic clock, when the slow sensors (ECC, rows, recovery, link errors, limits) were last read."""

    temperature_c: Value[float]
    headroom_c: Value[float]
    """°C left to the highest operating temperature; at or below 0 the device may slow itself down."""
    headroom_source: HeadroomSource
    """``margin`` (T.Limit), a threshold of the device's own, or ``assumed`` when it states no limit."""
    headroom_note: str
    """Why that source and no better one; empty when the source is the best there is."""
    slowdown_headroom_c: Value[float]
    """°C left until the hardware slows itself down."""

    memory_used_bytes: Value[int]
    """Whatever is not free, by any process or the driver's own reserve."""
    memory_total_bytes: Value[int]
    memory_source: MemorySource
    """``host`` on unified-memory parts that have no memory of their own to count."""

    power_w: Value[float]
    power_limit_w: Value[float]
    utilization_percent: Value[int]
    clocks_event_reasons: Value[ClocksEventReasons]

    ecc_uncorrected_volatile: Value[int]
    """Since the driver was loaded."""
    ecc_uncorrected_aggregate: Value[int]
    """In the life of the card."""
    remapped_rows: Value[RemappedRows]
    recovery_action: Value[RecoveryAction]
    pcie_replays: Value[int]
    nvlink_errors: Value[int]
    """CRC, replay and recovery errors of all links that the driver counts, added up: watch its growth."""
    mig_enabled: Value[bool]

    @property
    def lost(self) -> bool:
        """Whether the driver said of any sensor that the GPU is lost (it fell off the bus)."""
        return any(value.nvml_code == _GPU_IS_LOST for value in self.missing().values())

    @property
    def reset_required(self) -> bool:
        """Whether the driver refused any sensor because the GPU needs a reset."""
        return any(value.nvml_code == _RESET_REQUIRED for value in self.missing().values())

    def missing(self) -> dict[str, Unsupported | Unknown]:
        """The fields that hold no reading, by name."""
        values = {name: getattr(self, name) for name in SENSORS}
        return {name: value for name, value in values.items() if isinstance(value, Unsupported | Unknown)}

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable; a missing reading is ``{"unsupported": reason}`` or ``{"unknown": reason}``."""
        return {field.name: _jsonable(getattr(self, field.name)) for field in dataclasses.fields(self)}


_IDENTITY = {"index", "uuid", "name", "taken_at_s", "health_taken_at_s"}
_SAYINGS = {"headroom_source", "headroom_note", "memory_source"}
SENSORS = tuple(f.name for f in dataclasses.fields(Reading) if f.name not in _IDENTITY | _SAYINGS)
"""The fields of a `Reading` that are a `Value`."""


class Device(Protocol):
    """Anything that can be asked for a `Reading`; `trainwarden.testing` has one that can be scripted."""

    @property
    def index(self) -> int:
        """The device as torch numbers it."""

    @property
    def uuid(self) -> str: ...

    @property
    def name(self) -> str: ...

    def read(self) -> Reading:
        """All sensors now. Never raises; may block for as long as the driver does (`Sampler` never does)."""


def unreadable(index: int, uuid: str, name: str, missing: Unsupported | Unknown, taken_at_s: float) -> Reading:
    """The reading of a device of which nothing can be read, for the one reason given."""
    sensors: dict[str, Any] = dict.fromkeys(SENSORS, missing)
    return Reading(
        index=index,
        uuid=uuid,
        name=name,
        taken_at_s=taken_at_s,
        health_taken_at_s=taken_at_s,
        headroom_source="none",
        headroom_note=missing.reason,
        memory_source="device",
        **sensors,
    )


def _jsonable(value: Any) -> Any:
    if isinstance(value, Missing):
        return {str(value): value.reason}
    if isinstance(value, ClocksEventReasons):
        return {"raw": value.raw, "names": sorted(value.names)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value
