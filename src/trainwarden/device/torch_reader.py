"""What torch says about its own share of a GPU, without ever importing torch or starting CUDA for it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from .values import Unknown, Value


@dataclass(frozen=True, slots=True)
class AllocatorMemory:
    """Bytes of torch's caching allocator on one device. A full cache (``reserved``) is not pressure."""

    allocated_bytes: int
    reserved_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int


def allocator_memory(index: int) -> Value[AllocatorMemory]:
    """The allocator's counters of ``cuda:index``; unknown while this process has not used CUDA."""
    cuda = _running_cuda()
    if isinstance(cuda, Unknown):
        return cuda
    if not 0 <= index < cuda.device_count():
        return Unknown(f"torch sees no cuda:{index}")
    return AllocatorMemory(
        allocated_bytes=cuda.memory_allocated(index),
        reserved_bytes=cuda.memory_reserved(index),
        peak_allocated_bytes=cuda.max_memory_allocated(index),
        peak_reserved_bytes=cuda.max_memory_reserved(index),
    )


def torch_uuids() -> Value[tuple[str, ...]]:
    """The UUIDs of torch's devices in its own order, without the ``GPU-`` or ``MIG-`` in front."""
    cuda = _running_cuda()
    if isinstance(cuda, Unknown):
        return cuda
    properties = [cuda.get_device_properties(index) for index in range(cuda.device_count())]
    if not all(hasattr(each, "uuid") for each in properties):
        return Unknown("this torch does not report device UUIDs")
    return tuple(str(each.uuid).lower() for each in properties)


def _running_cuda() -> Any:
    """``torch.cuda`` when it is already in use, else the `Unknown` that says why not."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    if cuda is None:
        return Unknown("torch is not imported")
    if not cuda.is_initialized():
        return Unknown("CUDA is not initialised in this process")
    return cuda
