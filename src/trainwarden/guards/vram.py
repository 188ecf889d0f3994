"""Device memory taken by others: return our cache, then shrink the micro-batch, before an allocation fails.

A device that this process alone has filled is in good use, not under pressure: torch's cache (reserved − allocated)
is ours to use again, and what really does not fit is the business of the out-of-memory recovery. Pressure is a device
that is nearly full *and* on which memory that is not ours has grown since the run began. What is not ours is the
difference of two readings made at different moments, so it counts only while our own share stands still.

Unified-memory parts are left alone: there, the memory in use is the host's, page cache and data workers included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from trainwarden.device import AllocatorMemory, GpuProcess, Missing, Reading, Value
from trainwarden.errors import InvalidSettingError

VramAction = Literal["release_cache", "shrink"]

_SETTLED_FRACTION = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Bytes of one device: in use by anyone, in all, and reserved by this process's allocator."""

    used_bytes: int
    total_bytes: int
    reserved_bytes: int

    @classmethod
    def of(cls, reading: Reading, allocator: Value[AllocatorMemory]) -> Usage | None:
        """``None`` where the device's memory or our own share of it cannot be told."""
        used, total = reading.memory_used_bytes, reading.memory_total_bytes
        if isinstance(used, Missing) or isinstance(total, Missing) or isinstance(allocator, Missing):
            return None
        if reading.memory_source != "device":
            return None
        return cls(used_bytes=used, total_bytes=total, reserved_bytes=allocator.reserved_bytes)

    @property
    def foreign_bytes(self) -> int:
        """Not in our allocator: other processes, the driver's reserve, CUDA contexts, communication buffers."""
        return self.used_bytes - self.reserved_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class VramState:
    """What is remembered. ``foreign_bytes`` is the least that was not ours so far, ``None`` before the first look."""

    reserved_bytes: int | None = None
    foreign_bytes: int | None = None
    full: int = 0
    relieved: int = 0
    released: bool = False
    shrinks: int = 0


@dataclass(frozen=True, kw_only=True)
class VramPolicy:
    """Pressure begins above ``full_fraction`` of the device and ends at or below ``relieved_fraction``.

    Raises InvalidSettingError for fractions that contradict each other.
    """

    full_fraction: float = 0.95
    relieved_fraction: float = 0.90
    growth_fraction: float = 0.05
    """Of the device: how much others must have taken since the run began. Contexts and NCCL buffers are smaller."""
    samples: int = 3
    """In a row, before each action and for the end of pressure."""
    max_shrinks: int = 2
    """In one time of pressure."""

    def __post_init__(self) -> None:
        if not 0 < self.relieved_fraction < self.full_fraction <= 1:
            value = f"relieved {self.relieved_fraction:g}, full {self.full_fraction:g}"
            raise InvalidSettingError(
                setting="vram", value=value, expected="0 < relieved_fraction < full_fraction <= 1"
            )
        if not 0 < self.growth_fraction <= 1 or self.samples < 1 or self.max_shrinks < 0:
            value = f"growth {self.growth_fraction:g}, samples {self.samples}, shrinks {self.max_shrinks}"
            expected = "0 < growth_fraction <= 1, samples >= 1, max_shrinks >= 0"
            raise InvalidSettingError(setting="vram", value=value, expected=expected)

    def step(self, state: VramState, usage: Usage | None) -> tuple[VramState, VramAction | None]:
        """The state after one sample, and what to do. An unreadable sample (``None``) changes nothing."""
        if usage is None:
            return state, None
        settled = self._settled(state, usage)
        state = replace(state, reserved_bytes=usage.reserved_bytes)
        if usage.used_bytes <= self.relieved_fraction * usage.total_bytes:
            state = replace(state, full=0, relieved=state.relieved + 1)
            if state.relieved >= self.samples:
                state = replace(state, released=False, shrinks=0)
            return (self._note_foreign(state, usage) if settled else state), None
        state = replace(state, relieved=0)
        if not settled:
            return state, None
        state = self._note_foreign(state, usage)
        if not self._pressing(state, usage):
            return replace(state, full=0), None
        state = replace(state, full=state.full + 1)
        return self._act(state) if state.full >= self.samples else (state, None)

    def _act(self, state: VramState) -> tuple[VramState, VramAction | None]:
        if not state.released:
            return replace(state, released=True, full=0), "release_cache"
        if state.shrinks < self.max_shrinks:
            return replace(state, shrinks=state.shrinks + 1, full=0), "shrink"
        return state, None

    def _settled(self, state: VramState, usage: Usage) -> bool:
        if state.reserved_bytes is None or usage.foreign_bytes < 0:
            return False
        return abs(usage.reserved_bytes - state.reserved_bytes) <= _SETTLED_FRACTION * usage.total_bytes

    def _pressing(self, state: VramState, usage: Usage) -> bool:
        grown = usage.foreign_bytes - (usage.foreign_bytes if state.foreign_bytes is None else state.foreign_bytes)
        full = usage.used_bytes >= self.full_fraction * usage.total_bytes
        return full and grown >= self.growth_fraction * usage.total_bytes

    def _note_foreign(self, state: VramState, usage: Usage) -> VramState:
        least = usage.foreign_bytes if state.foreign_bytes is None else min(state.foreign_bytes, usage.foreign_bytes)
        return replace(state, foreign_bytes=least)


def largest_foreign(processes: Value[Sequence[GpuProcess]], own_pid: int) -> GpuProcess | None:
    """The other process that holds most; ``None`` when that cannot be told.

    In a container the driver may list the host's process ids: where our own is not among them, any of them might be
    ours, and none is named.
    """
    if isinstance(processes, Missing) or own_pid not in {process.pid for process in processes}:
        return None
    others = [process for process in processes if process.pid != own_pid]
    return max(others, key=lambda process: _or_zero(process.used_bytes), default=None)


def alone(processes: Value[Sequence[GpuProcess]], own_pid: int) -> bool:
    """Whether it is certain that no other process uses the device."""
    return not isinstance(processes, Missing) and {process.pid for process in processes} == {own_pid}


def _or_zero(value: Value[int]) -> int:
    return 0 if isinstance(value, Missing) else value
