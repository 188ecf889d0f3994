"""What the allocator tells about memory: the peak of one forward and backward pass, and the room for the next.

Only host-side counters of torch's caching allocator are read: nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch


class MemoryMeter(Protocol):
    """A source of observations. ``None`` from either method: it cannot be told."""

    def begin(self) -> None:
        """An attempt starts now."""

    def peak_bytes(self) -> int | None:
        """The most that was in use since `begin`, beyond what was in use then."""

    def room_bytes(self) -> int | None:
        """What this process may allocate now beyond what it has in use."""


_highest_bytes: dict[int, int] = {}
"""By device: the highest peak that a meter has reset."""


class CudaMeter:
    """Torch's caching allocator on one CUDA device.

    `begin` resets the allocator's peak; the highest one before it is kept for `peak_allocated_bytes`.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self._before_bytes = 0

    def begin(self) -> None:
        allocated = self._allocated()
        _highest_bytes[self._index] = max(_highest_bytes.get(self._index, 0), allocated["peak"])
        torch.cuda.reset_peak_memory_stats(self._index)
        self._before_bytes = allocated["current"]

    def peak_bytes(self) -> int | None:
        return self._allocated()["peak"] - self._before_bytes

    def room_bytes(self) -> int | None:
        """Free on the device and cached by torch, within this process's share. Asks the driver: not for every step."""
        free, total = torch.cuda.mem_get_info(self._index)
        allocated, reserved = torch.cuda.memory_allocated(self._index), torch.cuda.memory_reserved(self._index)
        share = int(torch.cuda.get_per_process_memory_fraction(self._index) * total)
        return max(0, min(free + reserved, share) - allocated)

    def _allocated(self) -> dict[str, int]:
        # Not `torch.cuda.memory_allocated`: that flattens and sorts all statistics to read one of them.
        counters: dict[str, int] = torch.cuda.memory_stats_as_nested_dict(self._index)["allocated_bytes"]["all"]
        return counters


def meter_of(leaves: Iterable[torch.Tensor]) -> MemoryMeter | None:
    """The meter of the CUDA device that holds ``leaves``.

    ``None`` where they are spread over devices, or on one without such statistics: what fits is then learned from what
    has fitted and failed.
    """
    devices = {leaf.device for leaf in leaves}
    if len(devices) == 1 and (device := devices.pop()).type == "cuda":
        return CudaMeter(device.index if device.index is not None else torch.cuda.current_device())
    return None


def peak_allocated_bytes(device: torch.device) -> int:
    """The most that tensors have taken on a CUDA device since `forget_peak_allocated_bytes`, whatever meters reset."""
    return max(int(torch.cuda.max_memory_allocated(device)), _highest_bytes.get(device.index or 0, 0))


def forget_peak_allocated_bytes(device: torch.device) -> None:
    torch.cuda.reset_peak_memory_stats(device)
    _highest_bytes.pop(device.index or 0, None)
