"""Which devices this process has: NVML's list of the machine, narrowed and numbered as CUDA will do it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .binding import Nvml, nvml
from .deadline import within
from .nvml import NvmlDevice, UnreachableDevice
from .reading import Device
from .torch_reader import torch_uuids
from .values import Missing, Unknown, Unsupported, Value
from .visible import MigPart, PhysicalGpu, Visible, select

DEADLINE_S = 5.0
"""How long a one-off question to the driver may take before the answer is `Unknown`."""


@dataclass(frozen=True, slots=True)
class DeviceList:
    """The visible devices in torch's order, and one sentence on why there are none or what is doubtful."""

    devices: tuple[Device, ...]
    reason: str
    """Empty when there is nothing to say."""


def list_devices(*, deadline_s: float = DEADLINE_S) -> DeviceList:
    """The devices that torch sees or will see, found without initialising CUDA. Never raises."""
    found = within(deadline_s, discover)
    return DeviceList((), found.reason) if isinstance(found, Unknown) else found


def driver_version(*, deadline_s: float = DEADLINE_S) -> Value[str]:
    """The version of the NVIDIA driver (``"570.86.15"``)."""
    return within(deadline_s, lambda: _ask("nvmlSystemGetDriverVersion"))


def cuda_driver_version(*, deadline_s: float = DEADLINE_S) -> Value[str]:
    """The newest CUDA version that the driver supports (``"12.8"``)."""
    number = within(deadline_s, lambda: _ask("nvmlSystemGetCudaDriverVersion_v2"))
    return number if isinstance(number, Unsupported | Unknown) else f"{number // 1000}.{number % 1000 // 10}"


def discover(environ: Mapping[str, str] = os.environ) -> DeviceList:
    """`list_devices` on the calling thread: blocks for as long as the driver does."""
    library = nvml()
    if not isinstance(library, Nvml):
        return DeviceList((), library.reason)
    count = library.call("nvmlDeviceGetCount")
    if isinstance(count, Missing):
        return DeviceList((), f"NVML cannot count the devices: {count.reason}")
    gpus: list[PhysicalGpu] = []
    problems: dict[int, Unsupported | Unknown] = {}
    for nvml_index in range(int(count)):
        gpu = _physical(library, nvml_index)
        if isinstance(gpu, Unsupported | Unknown):
            problems[nvml_index] = gpu
            gpu = PhysicalGpu(nvml_index, None, "unknown")
        gpus.append(gpu)
    selection = select(gpus, environ)
    chosen, doubt = _in_torch_order(selection.devices)
    devices = tuple(_device(index, visible, problems) for index, visible in enumerate(chosen))
    notes = [
        selection.note,
        doubt,
        *(f"GPU {place}: {problem.reason}" for place, problem in problems.items()),
    ]
    reason = "; ".join(note for note in notes if note)
    if not devices and not reason:
        reason = "the NVIDIA driver lists no GPU" if not gpus else "no GPU is visible to this process"
    return DeviceList(devices, reason)


def _physical(library: Nvml, nvml_index: int) -> PhysicalGpu | Unsupported | Unknown:
    handle = library.call("nvmlDeviceGetHandleByIndex", nvml_index)
    uuid: Any = handle if isinstance(handle, Missing) else library.call("nvmlDeviceGetUUID", handle)
    if isinstance(uuid, Unsupported | Unknown):
        return uuid
    name = library.call("nvmlDeviceGetName", handle)
    mode = library.call("nvmlDeviceGetMigMode", handle)
    mig = not isinstance(mode, Missing) and mode[0] == 1
    parts = _mig_parts(library, handle) if mig else ()
    return PhysicalGpu(nvml_index, str(uuid), "unknown" if isinstance(name, Missing) else str(name), mig, parts)


def _mig_parts(library: Nvml, handle: Any) -> tuple[MigPart, ...]:
    slots = library.call("nvmlDeviceGetMaxMigDeviceCount", handle)
    parts: list[MigPart] = []
    for slot in range(0 if isinstance(slots, Missing) else int(slots)):
        part = library.call("nvmlDeviceGetMigDeviceHandleByIndex", handle, slot)
        uuid: Any = part if isinstance(part, Missing) else library.call("nvmlDeviceGetUUID", part)
        if isinstance(uuid, Missing):
            continue  # an empty slot answers "not found"
        instances = (
            library.call("nvmlDeviceGetGpuInstanceId", part),
            library.call("nvmlDeviceGetComputeInstanceId", part),
        )
        gpu_instance, compute_instance = (None if isinstance(one, Missing) else int(one) for one in instances)
        parts.append(MigPart(str(uuid), gpu_instance, compute_instance))
    return tuple(parts)


def _in_torch_order(devices: Sequence[Visible]) -> tuple[list[Visible], str]:
    """The devices as a running torch numbers them; the second value says what could not be matched."""
    order = torch_uuids()
    if isinstance(order, Missing) or not devices:
        return list(devices), ""
    by_uuid = {_bare(_uuid(device)): device for device in devices}
    if not all(uuid in by_uuid for uuid in order):
        return list(devices), "torch reports other device UUIDs than the environment selects: numbers may differ"
    return [by_uuid[uuid] for uuid in order], ""


def _device(index: int, visible: Visible, problems: Mapping[int, Unsupported | Unknown]) -> Device:
    gpu = visible.gpu
    if gpu.uuid is None:
        return UnreachableDevice(index, problems[gpu.nvml_index])
    if visible.part is not None:
        return NvmlDevice(index, visible.part.uuid, f"{gpu.name} (MIG)", gpu_uuid=gpu.uuid)
    return NvmlDevice(index, gpu.uuid, gpu.name)


def _uuid(device: Visible) -> str:
    return (device.part.uuid if device.part else device.gpu.uuid) or ""


def _bare(uuid: str) -> str:
    return uuid.lower().removeprefix("gpu-").removeprefix("mig-")


def _ask(function: str) -> Any:
    library = nvml()
    return library.call(function) if isinstance(library, Nvml) else library
