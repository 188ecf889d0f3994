"""What a device holds besides the tensors of a run: a stated model, corrected by the runs this machine has finished.

The memory needed is ``peak × correction × (1 + fragmentation) + context + others``. A prediction counts tensors; what
is added here is the CUDA context with the libraries' workspaces, what the allocator cannot use of the segments it
holds, and other processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

GIB = 2**30

ASSUMED_CONTEXT_BYTES = round(0.6 * GIB)
"""CUDA context, loaded kernels and cuBLAS workspaces of one process. Published runs of LLaMA-Factory leave about
0.9 GiB beside the tensors, an idle context on current drivers 0.3 to 0.5 GiB; not measured here."""
ASSUMED_FRAGMENTATION = 0.03
"""Reserved over allocated bytes at the peak, minus one: 1.03 in a memory log published with PyTorch."""
CALIBRATION_RUNS = 3
"""Finished runs from which on this machine's own figures replace the assumed ones."""
REMEMBERED_RUNS = 20
"""The newest runs that count: drivers and libraries change."""


@dataclass(frozen=True, kw_only=True)
class RunMemory:
    """Predicted and real peaks of one run, in bytes. ``None``: not measured, or not what was predicted.

    Attributes:
        device: name of the device as its driver gives it.
        allocated_bytes: the most that the allocator handed out.
        reserved_bytes: the most that the allocator held.
        context_bytes: what the process held on the device beyond that.
    """

    device: str
    predicted_bytes: int
    allocated_bytes: int | None
    reserved_bytes: int | None = None
    context_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Overheads:
    """The model's three numbers, and where they come from.

    Attributes:
        correction: real over predicted peak; never below 1, because a run whose rows were short stays below its
            prediction for another reason.
        runs: finished runs it was calibrated by; 0: assumed.
    """

    context_bytes: int = ASSUMED_CONTEXT_BYTES
    fragmentation: float = ASSUMED_FRAGMENTATION
    correction: float = 1.0
    runs: int = 0

    @property
    def source(self) -> str:
        """One clause for people."""
        if self.runs:
            return f"measured by {self.runs} finished runs on this device"
        return "assumed: no finished runs on this device"

    def needed_bytes(self, peak_bytes: int) -> int:
        """Device memory that a run with this predicted peak takes."""
        return round(peak_bytes * self.correction * (1 + self.fragmentation)) + self.context_bytes

    def peak_budget_bytes(self, available_bytes: int) -> int:
        """The largest predicted peak whose run fits in ``available_bytes``; 0 when not even the context does."""
        budget = (available_bytes - self.context_bytes) / (self.correction * (1 + self.fragmentation))
        return max(0, int(budget))


NO_OVERHEADS = Overheads(context_bytes=0, fragmentation=0.0)
"""Of a budget that counts tensors only."""


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """The memory that a run may use.

    Attributes:
        total_bytes: as the driver reports it.
        others_bytes: held by other processes.
        source: where the numbers come from, in one clause.
    """

    name: str
    total_bytes: int
    others_bytes: int = 0
    source: str = "as asked"

    @property
    def available_bytes(self) -> int:
        return max(0, self.total_bytes - self.others_bytes)


def calibrated(runs: Iterable[RunMemory], device: str) -> Overheads:
    """The overheads on ``device``, from the newest finished runs on it (``runs``: newest first).

    Each number is the largest that was seen: a run that does not fit costs more than a few unused percent.
    """
    seen = [run for run in runs if run.device == device and run.allocated_bytes][:REMEMBERED_RUNS]
    if len(seen) < CALIBRATION_RUNS:
        return Overheads()
    correction = max(1.0, *(_ratio(run.allocated_bytes, run.predicted_bytes) for run in seen))
    found = Overheads(runs=len(seen), correction=correction)
    held = [_ratio(run.reserved_bytes, run.allocated_bytes) for run in seen if run.reserved_bytes]
    contexts = [run.context_bytes for run in seen if run.context_bytes]
    return replace(
        found,
        fragmentation=max(0.0, max(held) - 1) if held else ASSUMED_FRAGMENTATION,
        context_bytes=max(contexts) if contexts else ASSUMED_CONTEXT_BYTES,
    )


def _ratio(real_bytes: int | None, basis_bytes: int | None) -> float:
    return (real_bytes or 0) / (basis_bytes or 1) if basis_bytes else 1.0
