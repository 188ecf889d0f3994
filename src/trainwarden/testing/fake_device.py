"""GPUs that do what a test tells them, for everything that listens to `trainwarden.device`."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from trainwarden.device.discovery import DeviceList
from trainwarden.device.reading import (
    SENSORS,
    ClocksEventReasons,
    Reading,
    RecoveryAction,
    RemappedRows,
    unreadable,
)
from trainwarden.device.values import Unknown, Unsupported

GIB = 2**30
_SAYINGS = frozenset({"headroom_source", "headroom_note", "memory_source"})


def healthy_reading(index: int = 0, taken_at_s: float = 0.0, **changes: Any) -> Reading:
    """A GPU at work in good health (60 °C, 27 °C of headroom, half of 80 GiB used), with ``changes``."""
    reading = Reading(
        index=index,
        uuid=f"GPU-fake-{index}",
        name="Fake GPU",
        taken_at_s=taken_at_s,
        health_taken_at_s=taken_at_s,
        temperature_c=60.0,
        headroom_c=27.0,
        headroom_source="margin",
        headroom_note="",
        slowdown_headroom_c=29.0,
        memory_used_bytes=40 * GIB,
        memory_total_bytes=80 * GIB,
        memory_source="device",
        power_w=400.0,
        power_limit_w=700.0,
        utilization_percent=98,
        clocks_event_reasons=ClocksEventReasons.decode(0),
        ecc_uncorrected_volatile=0,
        ecc_uncorrected_aggregate=0,
        remapped_rows=RemappedRows(0, 0, False, False),
        recovery_action=RecoveryAction.decode(0),
        pcie_replays=0,
        nvlink_errors=0,
        mig_enabled=False,
    )
    return replace(reading, **changes)


class FakeDevice:
    """A `Device` that reads as it was told: healthy at first.

    `set` changes what it says from now on; `script` queues one change per reading, the last of which stays;
    `lose` makes it fall off the bus; `hang` blocks every reading, as a failing driver does, until `resume`.
    """

    def __init__(self, index: int = 0, *, clock: Callable[[], float] = time.monotonic, **sensors: Any) -> None:
        self._reading = healthy_reading(index)
        self._clock = clock
        self._queue: deque[Mapping[str, Any]] = deque()
        self._lost: Unknown | None = None
        self._free = threading.Event()
        self._free.set()
        self.reads = 0
        """How many readings were asked for."""
        self.set(**sensors)

    @property
    def index(self) -> int:
        return self._reading.index

    @property
    def uuid(self) -> str:
        return self._reading.uuid

    @property
    def name(self) -> str:
        return self._reading.name

    def set(self, **sensors: Any) -> FakeDevice:
        """Change sensors, by the names of `Reading`. A name that it does not have: TypeError."""
        unknown = sorted(set(sensors) - set(SENSORS) - _SAYINGS)
        if unknown:
            raise TypeError(f"a reading has no sensor {', '.join(unknown)}")
        self._reading = replace(self._reading, **sensors)
        return self

    def script(self, changes: Iterable[Mapping[str, Any]]) -> FakeDevice:
        """Apply one of ``changes`` before each of the next readings; after the last, that one stays."""
        self._queue.extend(changes)
        return self

    def lose(self) -> FakeDevice:
        """From now on every sensor is `Unknown`, as when the GPU has fallen off the bus."""
        self._lost = Unknown("GPU is lost", nvml_code=15)
        return self

    def hang(self) -> FakeDevice:
        """Block every reading from now on until `resume`."""
        self._free.clear()
        return self

    def resume(self) -> FakeDevice:
        """End a `hang`, for the readings that wait in it too."""
        self._free.set()
        return self

    def read(self) -> Reading:
        """What the test told it, stamped with the clock."""
        self.reads += 1
        self._free.wait()
        if self._queue:
            self.set(**self._queue.popleft())
        now_s = self._clock()
        if self._lost is not None:
            return unreadable(self.index, self.uuid, self.name, self._lost, now_s)
        return replace(self._reading, taken_at_s=now_s, health_taken_at_s=now_s)


class FakeSource:
    """Fake devices, and Xids on demand, for a sampler: ``Sampler(FakeSource(FakeDevice()))``."""

    def __init__(self, *devices: FakeDevice, reason: str = "") -> None:
        self.devices = devices
        self._reason = reason if devices else reason or "no fake devices"
        self._xids: deque[tuple[int, str | None]] = deque()

    def xid(self, code: int, device: FakeDevice | None = None) -> None:
        """Deliver an Xid, of ``device`` or of a GPU that the driver does not name, with the next sample."""
        self._xids.append((code, None if device is None else device.uuid))

    def open(self) -> DeviceList:
        return DeviceList(self.devices, self._reason)

    def drain_xids(self) -> list[tuple[int, str | None]]:
        return [self._xids.popleft() for _ in range(len(self._xids))]

    def unwatched(self) -> Mapping[str, Unsupported | Unknown]:
        return {}
