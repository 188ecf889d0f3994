"""What the hardware guard wants done at a step boundary; the runtime does it, in the order given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from trainwarden.errors import WardenError
from trainwarden.events import Event, MemoryPressure, ThermalPause, ThermalResume


@dataclass(frozen=True, slots=True)
class Warn:
    """Tell the observers; nothing else."""

    event: Event


@dataclass(frozen=True, slots=True)
class Pause:
    """Write a checkpoint, then wait, observing about once a second, until `Resume` or `Abort`."""

    event: ThermalPause


@dataclass(frozen=True, slots=True)
class Resume:
    """End the pause."""

    event: ThermalResume


@dataclass(frozen=True, slots=True)
class ReleaseCache:
    """Return the allocator's cached memory to the device (``torch.cuda.empty_cache``)."""

    event: MemoryPressure


@dataclass(frozen=True, slots=True)
class Shrink:
    """Halve the largest micro-batch, then return the cached memory: only so does the need become smaller."""

    event: MemoryPressure


@dataclass(frozen=True, slots=True)
class Abort:
    """End the run with ``error``. It is the last decision of its list."""

    error: WardenError
    save_first: bool
    """Whether a checkpoint may be written from the device; if not, the last verified one stands."""


Decision: TypeAlias = Warn | Pause | Resume | ReleaseCache | Shrink | Abort
