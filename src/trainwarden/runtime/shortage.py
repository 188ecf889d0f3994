"""An out-of-memory error, reduced to what may be kept of it, and the `GPUMemoryError` made of it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from trainwarden.device import GpuProcess, known, list_devices
from trainwarden.device.deadline import within
from trainwarden.errors import GPUMemoryError
from trainwarden.guards.oom import MemoryFailure, is_out_of_memory
from trainwarden.guards.vram import largest_foreign

PROCESSES_DEADLINE_S = 2.0
"""How long the driver may take to name the other processes; the error does not wait longer."""

_DEVICE = re.compile(r"\bGPU (\d+) has a total capacity")

T = TypeVar("T")


@dataclass(frozen=True)
class Shortage:
    """An out-of-memory error without its traceback: that holds the failed frames, and they hold the memory.

    ``device`` is torch's number of the CUDA device that was full, ``reserved_bytes`` what this process's allocator
    held of it at that moment; ``None`` where no CUDA device was.
    """

    phase: str
    memory: MemoryFailure
    cause: BaseException
    device: int | None = None
    free_bytes: int | None = None
    reserved_bytes: int | None = None

    @classmethod
    def of(cls, phase: str, error: BaseException) -> Shortage:
        error.__traceback__ = error.__context__ = None
        memory = MemoryFailure.from_exception(error)
        if not _on_cuda(error):
            return cls(phase, memory, error, free_bytes=memory.free_bytes)
        named = _DEVICE.search(str(error))
        device = int(named[1]) if named else torch.cuda.current_device()
        device = device if device < torch.cuda.device_count() else torch.cuda.current_device()
        free = memory.free_bytes if memory.free_bytes is not None else torch.cuda.mem_get_info(device)[0]
        return cls(phase, memory, error, device, free, torch.cuda.memory_reserved(device))

    def error(
        self,
        why: str,
        *,
        micro_batch_size: int | None = None,
        shrinks: int | None = None,
        would_fit: str | None = None,
    ) -> GPUMemoryError:
        """The typed error, chained from the original one. Asks the driver who else uses the device."""
        foreign = None if self.device is None else _foreign_process(self.device)
        error = GPUMemoryError(
            phase=self.phase,
            micro_batch_size=micro_batch_size,
            shrinks=shrinks,
            requested_bytes=self.memory.requested_bytes,
            free_bytes=self.free_bytes,
            reserved_bytes=self.reserved_bytes,
            foreign_pid=foreign.pid if foreign else None,
            foreign_bytes=known(foreign.used_bytes) if foreign else None,
            would_fit=would_fit,
            problem=f"{why}: {self.memory.text}" if why else self.memory.text,
        )
        error.__cause__ = self.cause
        return error


def attempted(phase: str, task: Callable[[], T]) -> tuple[T | None, Shortage | None]:
    """What ``task`` returns, or the shortage of memory that ended it. Other errors pass through."""
    try:
        return task(), None
    except (RuntimeError, MemoryError) as error:
        return None, shortage_of(phase, error)


def shortage_of(phase: str, error: RuntimeError | MemoryError) -> Shortage:
    """What is left of an out-of-memory error. Any other is raised again."""
    if not is_out_of_memory(error):
        raise error
    return Shortage.of(phase, error)


def foreign_process(devices: Sequence[Any], index: int, own_pid: int) -> GpuProcess | None:
    """The other process that holds most of ``devices[index]``; ``None`` where that cannot be told."""
    if not 0 <= index < len(devices) or not hasattr(devices[index], "processes"):
        return None
    return largest_foreign(within(PROCESSES_DEADLINE_S, devices[index].processes), own_pid)


def _foreign_process(index: int) -> GpuProcess | None:
    return foreign_process(list_devices(deadline_s=PROCESSES_DEADLINE_S).devices, index, os.getpid())


def _on_cuda(error: BaseException) -> bool:
    """Whether it was a CUDA device that was full, and not the host."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    return not isinstance(error, MemoryError) and "DefaultCPUAllocator" not in str(error)


def more_memory(shortage: Shortage) -> str | None:
    """What would have been enough, as far as the error tells."""
    requested, free = shortage.memory.requested_bytes, shortage.memory.free_bytes
    return None if requested is None else f"{max(requested - (free or 0), 0) / 2**20:,.1f} MiB more"
