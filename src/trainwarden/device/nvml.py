"""One GPU, or one MIG part of it, read through NVML."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .binding import UNINITIALIZED, Nvml, forget, nvml
from .headroom import decide_headroom, plausible_temperature
from .nvml_sensors import (
    Health,
    read_health,
    read_memory,
    read_reasons,
    read_thermals,
    read_utilization,
    used_bytes,
    watts,
)
from .reading import Reading, unreadable
from .values import Missing, Unknown, Unsupported, Value

HEALTH_EVERY_S = 15.0
"""Period of the slow sensors. They cost more and change rarely."""


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process with a CUDA context on the device. In a container, ``pid`` may be one of the host's."""

    pid: int
    used_bytes: Value[int]


@dataclass(frozen=True, slots=True)
class _Handles:
    """``part`` is the device itself; ``gpu`` the whole card, the same unless the device is a MIG part."""

    library: Nvml
    part: Any
    gpu: Any


class NvmlDevice:
    """A `Device` found by UUID, so that it is the same card whatever the numbering; survives a fork.

    ``gpu_uuid`` names the card of a MIG part, which has memory of its own but shares every other sensor.
    """

    def __init__(
        self,
        index: int,
        uuid: str,
        name: str,
        *,
        gpu_uuid: str | None = None,
        health_every_s: float = HEALTH_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.index = index
        self.uuid = uuid
        self.name = name
        self.gpu_uuid = gpu_uuid or uuid
        self._health_every_s = health_every_s
        self._clock = clock
        self._handles: _Handles | None = None
        self._health: Health | None = None

    def __repr__(self) -> str:
        return f"NvmlDevice(index={self.index}, uuid={self.uuid!r}, name={self.name!r})"

    def read(self) -> Reading:
        """All sensors now; the slow ones as of at most `HEALTH_EVERY_S` ago. Never raises."""
        reading = self._read()
        temperature = reading.temperature_c
        if isinstance(temperature, Missing) and temperature.nvml_code == UNINITIALIZED:
            # Another user of NVML in this process shut it down once too often: initialise it anew.
            if self._handles is not None:
                forget(self._handles.library)
            reading = self._read()
        return reading

    def processes(self) -> Value[tuple[GpuProcess, ...]]:
        """Who holds memory on the device. Takes milliseconds under the driver's lock: only on demand."""
        handles = self._open()
        if not isinstance(handles, _Handles):
            return handles
        name = "nvmlDeviceGetComputeRunningProcesses"
        found = handles.library.first_of((f"{name}_v3", handles.part), (f"{name}_v2", handles.part))
        if isinstance(found, Unsupported | Unknown):
            return found
        return tuple(GpuProcess(int(each.pid), used_bytes(each.usedGpuMemory)) for each in found)

    def _read(self) -> Reading:
        handles = self._open()
        now_s = self._clock()
        if not isinstance(handles, _Handles):
            return unreadable(self.index, self.uuid, self.name, handles, now_s)
        health = self._health
        if health is None or now_s - health.taken_at_s >= self._health_every_s:
            health = self._health = read_health(handles.library, handles.gpu, now_s)
        library, gpu = handles.library, handles.gpu
        reasons = read_reasons(library, gpu)
        thermals = read_thermals(library, gpu, health, reasons)
        headroom = decide_headroom(thermals)
        used, total, source = read_memory(library, handles.part)
        return Reading(
            index=self.index,
            uuid=self.uuid,
            name=self.name,
            taken_at_s=now_s,
            health_taken_at_s=health.taken_at_s,
            temperature_c=plausible_temperature(thermals.temperature_c),
            headroom_c=headroom.headroom_c,
            headroom_source=headroom.source,
            headroom_note=headroom.note,
            slowdown_headroom_c=headroom.slowdown_headroom_c,
            memory_used_bytes=used,
            memory_total_bytes=total,
            memory_source=source,
            power_w=watts(library.call("nvmlDeviceGetPowerUsage", gpu)),
            utilization_percent=read_utilization(library, gpu),
            clocks_event_reasons=reasons,
            **health.slow,
        )

    def _open(self) -> _Handles | Unsupported | Unknown:
        library = nvml()
        if not isinstance(library, Nvml):
            return library
        if self._handles is not None and self._handles.library is library:
            return self._handles
        self._health = None
        part = library.call("nvmlDeviceGetHandleByUUID", self.uuid)
        gpu = part if self.gpu_uuid == self.uuid else library.call("nvmlDeviceGetHandleByUUID", self.gpu_uuid)
        for handle in (part, gpu):
            if isinstance(handle, Unsupported | Unknown):
                return handle
        self._handles = _Handles(library, part, gpu)
        return self._handles


class UnreachableDevice:
    """A GPU that the driver counts but cannot open: its place and the reason are kept."""

    def __init__(self, index: int, missing: Unsupported | Unknown, *, uuid: str = "", name: str = "unknown") -> None:
        self.index = index
        self.uuid = uuid
        self.name = name
        self._missing = missing

    def read(self) -> Reading:
        """A reading that holds only the reason."""
        return unreadable(self.index, self.uuid, self.name, self._missing, time.monotonic())
