"""What the hardware says: one protocol, readers of NVML, torch and the host, a sampler that never blocks.

A reading is a value, or the typed statement that there is none (`Unsupported`, `Unknown`): an unreadable
sensor is never a healthy one. Importing this room imports neither torch nor NVML.
"""

from trainwarden.device.discovery import DeviceList, cuda_driver_version, driver_version, list_devices
from trainwarden.device.host import HostMemory, cpu_count, disk_free_bytes, host_memory
from trainwarden.device.nvml import GpuProcess, NvmlDevice
from trainwarden.device.reading import (
    ClocksEventReasons,
    Device,
    Reading,
    RecoveryAction,
    RemappedRows,
    unreadable,
)
from trainwarden.device.sampler import NvmlSource, Sample, Sampler, SensorSilent, Source, snapshot
from trainwarden.device.torch_reader import AllocatorMemory, allocator_memory
from trainwarden.device.values import Missing, Unknown, Unsupported, Value, known
from trainwarden.device.xid import Xid

__all__ = [
    "AllocatorMemory",
    "ClocksEventReasons",
    "Device",
    "DeviceList",
    "GpuProcess",
    "HostMemory",
    "Missing",
    "NvmlDevice",
    "NvmlSource",
    "Reading",
    "RecoveryAction",
    "RemappedRows",
    "Sample",
    "Sampler",
    "SensorSilent",
    "Source",
    "Unknown",
    "Unsupported",
    "Value",
    "Xid",
    "allocator_memory",
    "cpu_count",
    "cuda_driver_version",
    "disk_free_bytes",
    "driver_version",
    "host_memory",
    "known",
    "list_devices",
    "snapshot",
    "unreadable",
]
