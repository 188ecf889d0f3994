"""Out of memory: what counts as one, what its message tells, and how a batch shrinks."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch

_MESSAGES = re.compile(
    r"""
      ^CUDA\ (error:\ |driver\ error:\ )?out\ of\ memory  # caching allocator; runtime; driver (expandable segments)
    | ^(HIP|XPU)\ (error:\ )?out\ of\ memory
    | ^MPS\ backend\ out\ of\ memory
    | UR_RESULT_ERROR_OUT_OF_(DEVICE|HOST)_MEMORY         # XPU, below torch's allocator
    | (CUBLAS|HIPBLAS|CUSOLVER|CUSPARSE)_STATUS_ALLOC_FAILED | CUFFT_ALLOC_FAILED
    | (CUBLAS|HIPBLAS)_STATUS_NOT_INITIALIZED             # the library's handle cannot get its workspace
    | CUDNN_STATUS_(INTERNAL_ERROR_(DEVICE|HOST)_)?ALLOC(ATION)?_FAILED
    | [Uu]nable\ to\ find\ an\ engine\ to\ execute        # cuDNN: no algorithm fits its workspace
    | Cuda\ failure\ (2\ )?'out\ of\ memory'              # NCCL
    | DefaultCPUAllocator:\ (can't\ allocate\ memory|not\ enough\ memory)
    | ^std::bad_alloc$
    """,
    re.VERBOSE | re.MULTILINE,
)
_REQUESTED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB)")
_FREE = re.compile(r"of which ([\d.]+) ?(bytes|KiB|MiB|GiB) is free")
_UNUSED = re.compile(r"([\d.]+) ?(bytes|KiB|MiB|GiB) is reserved by PyTorch but unallocated")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether ``exc`` says that memory ran out, on a device or on the host.

    Decided by type first (``torch.OutOfMemoryError``, ``MemoryError``); a plain ``RuntimeError`` counts only when
    its text is one that a known allocator, driver or library writes.
    """
    if isinstance(exc, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(exc, RuntimeError) and _MESSAGES.search(_text(exc)) is not None


@dataclass(frozen=True)
class MemoryFailure:
    """What an out-of-memory message tells. ``None`` means that it does not say.

    ``free_bytes`` are free on the device, ``unused_bytes`` held by the allocator without being in use: in pieces that
    were too small.
    """

    text: str
    requested_bytes: int | None
    free_bytes: int | None
    unused_bytes: int | None = None

    @classmethod
    def from_exception(cls, exc: BaseException) -> MemoryFailure:
        text = _text(exc)
        first_line = text.strip().splitlines()[0] if text.strip() else type(exc).__name__
        # What follows the requested size (device totals, allocator advice) is of no use in a one-line report.
        requested = _REQUESTED.search(first_line)
        return cls(
            first_line[: requested.end()] if requested else first_line[:200],
            _parse_bytes(_REQUESTED, text),
            _parse_bytes(_FREE, text),
            _parse_bytes(_UNUSED, text),
        )


def _text(exc: BaseException) -> str:
    """The message alone: ``torch.AcceleratorError`` carries an error code beside it."""
    return exc.args[0] if exc.args and isinstance(exc.args[0], str) else str(exc)


def _parse_bytes(pattern: re.Pattern[str], text: str) -> int | None:
    match = pattern.search(text)
    return int(float(match[1]) * _UNITS[match[2]]) if match else None


@dataclass(frozen=True)
class OOMPolicy:
    """``max_shrinks`` bounds the consecutive shrinks of one step; a micro-batch never shrinks below one row."""

    enabled: bool = True
    max_shrinks: int = 3

    def may_shrink(self, failed_rows: int, shrinks_this_step: int) -> bool:
        """Whether a micro-batch of ``failed_rows`` that did not fit may be cut smaller."""
        return self.enabled and failed_rows > 1 and shrinks_this_step < self.max_shrinks


def part_sizes(rows: int, limit: int, used: Collection[int] = ()) -> tuple[int, ...]:
    """Sizes of the parts of ``rows`` rows, none above ``limit``, of at most two different sizes.

    As few parts as possible, nearly equal. Among divisions into that many parts, one that needs fewer sizes not in
    ``used`` is preferred, because every new shape costs a compiled model a recompilation.
    """
    if rows < 1 or limit < 1:
        raise ValueError(f"rows and limit must be positive, got {rows} and {limit}")
    count = -(-rows // limit)
    small, larger = divmod(rows, count)
    balanced = (small + 1,) * larger + (small,) * (count - larger)
    full, rest = divmod(rows, limit)
    filled = (limit,) * full + ((rest,) if rest else ())
    return min(balanced, filled, key=lambda sizes: len(set(sizes) - set(used)))
