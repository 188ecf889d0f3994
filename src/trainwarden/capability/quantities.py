"""The amounts that a requirement can ask for: memory, versions, counts, each with where it was read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainwarden.capability.machine import Machine, TorchBuild
from trainwarden.capability.verdict import Status, Verdict
from trainwarden.device import DeviceList, HostMemory, Missing, Unknown, Value

Amount = int | tuple[int, ...]
"""Bytes, a count or a compute capability as one number; a version as several."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """``amount`` None: there is none, or (``status`` unknown) it could not be read."""

    amount: Amount | None
    found: str
    """The amount in words."""
    reason: str
    status: Status = Status.SUPPORTED

    def to_dict(self) -> dict[str, Any]:
        amount = list(self.amount) if isinstance(self.amount, tuple) else self.amount
        return {"amount": amount, "found": self.found, "reason": self.reason, "status": str(self.status)}


@dataclass(frozen=True)
class Readings:
    """What was read of this machine, without starting CUDA."""

    build: TorchBuild | None
    devices: DeviceList
    device_memory: tuple[Value[int], ...]
    """Bytes of each device in ``devices``, by the driver."""
    driver: Value[str]
    driver_cuda: Value[str]
    memory: HostMemory
    disk_free: Value[int]
    place: Path

    @classmethod
    def take(cls, machine: Machine, place: Path) -> Readings:
        devices = machine.devices()
        return cls(
            build=machine.torch_build(),
            devices=devices,
            device_memory=tuple(one.read().memory_total_bytes for one in devices.devices),
            driver=machine.driver_version(),
            driver_cuda=machine.cuda_driver_version(),
            memory=machine.host_memory(),
            disk_free=machine.disk_free_bytes(place),
            place=place,
        )


def quantities(readings: Readings, cuda: Verdict) -> dict[str, Quantity]:
    """Every amount by its name. Those of GPUs are of the devices that torch can really use.

    Args:
        cuda: the verdict of the child's ``cuda`` task, with its devices.
    """
    return {
        "gpus": _gpus(readings, cuda),
        "vram": _vram(readings, cuda),
        "sm": _sm(cuda),
        "driver": _version(readings.driver, "the NVIDIA driver"),
        "cuda": _cuda(readings, cuda),
        "ram": _ram(readings.memory),
        "disk": _disk(readings),
    }


def _usable(cuda: Verdict) -> list[Mapping[str, Any]]:
    return list(cuda.evidence.get("devices", ())) if cuda.supported else []


def _no_gpu(cuda: Verdict, note: str = "") -> Quantity:
    reason = f"{cuda.reason}; {note}" if note else cuda.reason
    if cuda.status is Status.UNKNOWN:
        return Quantity(None, "unknown", reason, Status.UNKNOWN)
    return Quantity(None, "no usable GPU", reason, Status.UNSUPPORTED)


def _gpus(readings: Readings, cuda: Verdict) -> Quantity:
    usable = _usable(cuda)
    listed = len(readings.devices.devices)
    if not usable and cuda.status is Status.UNKNOWN:
        return _no_gpu(cuda)
    if not usable:
        note = f"; the driver lists {listed}" if listed else ""
        return Quantity(0, "0", f"{cuda.reason}{note}", Status.UNSUPPORTED)
    names = ", ".join(sorted({str(each["name"]) for each in usable}))
    return Quantity(len(usable), str(len(usable)), names)


def _vram(readings: Readings, cuda: Verdict) -> Quantity:
    usable = _usable(cuda)
    if not usable:
        return _no_gpu(cuda)
    by_driver = readings.device_memory if len(readings.device_memory) == len(usable) else ()
    sizes = [int(each["total_bytes"]) for each in usable]
    for index, size in enumerate(by_driver):
        if not isinstance(size, Missing):
            sizes[index] = size  # the whole of the card: torch's total lacks what the driver keeps for itself
    least = min(sizes)
    where = f"cuda:{sizes.index(least)} ({usable[sizes.index(least)]['name']})"
    return Quantity(least, gib(least), f"the least of {len(sizes)}, on {where}" if len(sizes) > 1 else f"on {where}")


def _sm(cuda: Verdict) -> Quantity:
    usable = _usable(cuda)
    if not usable:
        return _no_gpu(cuda)
    numbers = [each["sm"] for each in usable]
    if None in numbers:
        return Quantity(None, "unknown", "ROCm devices have no compute capability", Status.UNKNOWN)
    least = min(numbers)
    where = f"cuda:{numbers.index(least)} ({usable[numbers.index(least)]['name']})"
    return Quantity(
        least, str(least), f"the least of {len(numbers)}, on {where}" if len(numbers) > 1 else f"on {where}"
    )


def _version(value: Value[str], what: str) -> Quantity:
    if isinstance(value, Missing):
        return _missing(value, f"{what} cannot be asked: {value.reason}")
    numbers = version(value)
    if numbers is None:
        return Quantity(None, "unknown", f"{what} calls its version {value!r}", Status.UNKNOWN)
    return Quantity(numbers, value, what)


def _cuda(readings: Readings, cuda: Verdict) -> Quantity:
    """The CUDA that training would use: torch's own, once a product on the GPU has come out right."""
    driver = readings.driver_cuda
    note = "" if isinstance(driver, Missing) else f"the driver supports up to {driver}"
    if not cuda.supported:
        return _no_gpu(cuda, note)
    build = readings.build
    if build is None or build.cuda is None:
        return Quantity(None, "none", "this torch is built for ROCm", Status.UNSUPPORTED)
    quantity = _version(build.cuda, "torch's CUDA")
    return Quantity(quantity.amount, quantity.found, f"{quantity.reason}; {note}" if note else quantity.reason)


def _ram(memory: HostMemory) -> Quantity:
    by = "of this machine" if memory.limit_source == "machine" else "by the limit of the container or job"
    return Quantity(memory.total_bytes, gib(memory.total_bytes), f"{by}, {gib(memory.available_bytes)} available")


def _disk(readings: Readings) -> Quantity:
    free = readings.disk_free
    if isinstance(free, Missing):
        return _missing(free, free.reason)
    return Quantity(free, gib(free), "free where the command runs")


def _missing(value: Missing, reason: str) -> Quantity:
    if isinstance(value, Unknown):
        return Quantity(None, "unknown", reason, Status.UNKNOWN)
    return Quantity(None, "none", reason, Status.UNSUPPORTED)


def version(text: str) -> tuple[int, ...] | None:
    """``"570.86.15"`` as numbers, without zeros at the end so that 12.4 equals 12.4.0; None for no version."""
    match = re.match(r"\d{1,9}(?:\.\d{1,9}){0,5}", text, re.ASCII)
    if match is None:
        return None
    numbers = [int(part) for part in match[0].split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"
