"""Each sensor of a GPU as a call or a few to NVML, turned into a `Value`. Nothing here has state."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypedDict

from .binding import NOT_SUPPORTED, Nvml
from .headroom import Thermals
from .host import host_memory
from .reading import ClocksEventReasons, MemorySource, RecoveryAction, RemappedRows
from .values import Missing, Unknown, Unsupported, Value

_GPU_SENSOR = 0
_THRESHOLDS = {"shutdown_c": 0, "slowdown_c": 1, "gpu_max_c": 3}
_UNCORRECTED, _VOLATILE, _AGGREGATE = 1, 0, 1
_MEMORY_V2 = 0x02000028
_ALL_LINKS = 0xFFFFFFFF
_SLOWDOWN_TLIMIT_FIELD = 194
_RECOVERY_FIELD = 230
# Totals over all links: flow-control CRC, data CRC, replay, recovery; then Hopper's replay, recovery, CRC.
_NVLINK_FIELDS = (38, 45, 52, 59, (161, _ALL_LINKS), (162, _ALL_LINKS), (163, _ALL_LINKS))
_NOT_AVAILABLE = frozenset({0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF})


class Slow(TypedDict):
    """The sensors read every `HEALTH_EVERY_S`, under the names of their `Reading` fields."""

    power_limit_w: Value[float]
    ecc_uncorrected_volatile: Value[int]
    ecc_uncorrected_aggregate: Value[int]
    remapped_rows: Value[RemappedRows]
    recovery_action: Value[RecoveryAction]
    pcie_replays: Value[int]
    nvlink_errors: Value[int]
    mig_enabled: Value[bool]


@dataclass(frozen=True, slots=True)
class Health:
    """The slow sensors and the temperature limits of a card, as of ``taken_at_s``."""

    taken_at_s: float
    slow: Slow
    limits: dict[str, Value[float]]


def read_health(library: Nvml, gpu: Any, now_s: float) -> Health:
    """The slow sensors and the limits of a card."""
    slowdown_offset, recovery, *links = library.fields(gpu, (_SLOWDOWN_TLIMIT_FIELD, _RECOVERY_FIELD, *_NVLINK_FIELDS))
    limits = {
        name: _float(library.call("nvmlDeviceGetTemperatureThreshold", gpu, code)) for name, code in _THRESHOLDS.items()
    }
    slow = Slow(
        power_limit_w=watts(library.call("nvmlDeviceGetEnforcedPowerLimit", gpu)),
        ecc_uncorrected_volatile=_ecc(library, gpu, _VOLATILE),
        ecc_uncorrected_aggregate=_ecc(library, gpu, _AGGREGATE),
        remapped_rows=_rows(library.call("nvmlDeviceGetRemappedRows", gpu)),
        recovery_action=recovery if isinstance(recovery, Missing) else RecoveryAction.decode(int(recovery)),
        pcie_replays=_integer(library.call("nvmlDeviceGetPcieReplayCounter", gpu)),
        nvlink_errors=_total(links),
        mig_enabled=_mig(library.call("nvmlDeviceGetMigMode", gpu)),
    )
    return Health(now_s, slow, {**limits, "slowdown_offset_c": _signed(slowdown_offset)})


def read_thermals(library: Nvml, gpu: Any, health: Health, reasons: Value[ClocksEventReasons]) -> Thermals:
    """Temperature and margin now, beside the limits read earlier."""
    temperature = library.first_of(
        ("nvmlDeviceGetTemperatureV", gpu, _GPU_SENSOR), ("nvmlDeviceGetTemperature", gpu, _GPU_SENSOR)
    )
    return Thermals(
        temperature_c=_float(temperature),
        margin_c=_float(library.call("nvmlDeviceGetMarginTemperature", gpu)),
        heat_confirmed=not isinstance(reasons, Missing) and reasons.thermal,
        **health.limits,
    )


def read_reasons(library: Nvml, gpu: Any) -> Value[ClocksEventReasons]:
    """Why the clocks are held down."""
    raw = library.first_of(
        ("nvmlDeviceGetCurrentClocksEventReasons", gpu), ("nvmlDeviceGetCurrentClocksThrottleReasons", gpu)
    )
    return raw if isinstance(raw, Unsupported | Unknown) else ClocksEventReasons.decode(int(raw))


def read_memory(library: Nvml, part: Any) -> tuple[Value[int], Value[int], MemorySource]:
    """Bytes in use and in all. What is not free counts as used: both versions of the call agree on that."""
    memory = library.first_of(("nvmlDeviceGetMemoryInfo", part, _MEMORY_V2), ("nvmlDeviceGetMemoryInfo", part))
    if not isinstance(memory, Unsupported | Unknown):
        if not memory.total:
            nothing = Unknown("the driver reports a device without memory")
            return nothing, nothing, "device"
        return int(memory.total) - int(memory.free), int(memory.total), "device"
    if isinstance(memory, Unsupported) and memory.nvml_code == NOT_SUPPORTED:
        # Unified-memory parts (GB10, Jetson) have no memory of their own: the host's is the device's.
        host = host_memory()
        return host.total_bytes - host.available_bytes, host.total_bytes, "host"
    return memory, memory, "device"


def read_utilization(library: Nvml, gpu: Any) -> Value[int]:
    """Percent of the last sampling period in which a kernel ran."""
    rates = library.call("nvmlDeviceGetUtilizationRates", gpu)
    return rates if isinstance(rates, Unsupported | Unknown) else int(rates.gpu)


def _ecc(library: Nvml, gpu: Any, counter: int) -> Value[int]:
    return _integer(library.call("nvmlDeviceGetTotalEccErrors", gpu, _UNCORRECTED, counter))


def _rows(rows: Any) -> Value[RemappedRows]:
    if isinstance(rows, Unsupported | Unknown):
        return rows
    corrected, uncorrected, pending, failed = rows
    return RemappedRows(int(corrected), int(uncorrected), bool(pending), bool(failed))


def _mig(mode: Any) -> Value[bool]:
    return mode if isinstance(mode, Unsupported | Unknown) else mode[0] == 1


def _total(counters: list[Value[float]]) -> Value[int]:
    """The sum of the counters that exist; when none does, why the first does not."""
    numbers = [int(counter) for counter in counters if not isinstance(counter, Missing)]
    missing = [counter for counter in counters if isinstance(counter, Missing)]
    return sum(numbers) if numbers else replace(missing[0], reason=f"no NVLink counter: {missing[0].reason}")


def _integer(value: Any) -> Value[int]:
    if isinstance(value, Unsupported | Unknown):
        return value
    return Unknown("the driver has no value for it now") if value in _NOT_AVAILABLE else int(value)


def _float(value: Any) -> Value[float]:
    return value if isinstance(value, Unsupported | Unknown) else float(value)


def _signed(value: Value[float]) -> Value[float]:
    # T.Limit offsets are signed; a driver that labels them unsigned turns −2 into 4294967294.
    return value if isinstance(value, Missing) or value < 2**31 else value - 2**32


def watts(milliwatts: Any) -> Value[float]:
    """NVML counts milliwatts."""
    value = _integer(milliwatts)
    return value if isinstance(value, Missing) else value / 1000.0


def used_bytes(value: int | None) -> Value[int]:
    """The binding says None where the driver does not tell memory by process (Windows, some containers)."""
    return Unsupported("this driver does not tell memory by process") if value is None else int(value)
