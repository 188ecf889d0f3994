"""Memory for merged states: one block for a whole state, on large pages, kept for the next one.

A merge writes a new state as large as the accumulator. Into memory that the system has just mapped that costs more than
the merge itself: each page is cleared at its first touch, 4 KiB at a time. So a state lies in one block that asks for
large pages, and a block that nobody uses any more is kept for the next state of the same size, with its content given
up (``MADV_FREE``): a system that runs short of memory takes it without asking.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor

SMALLEST_BYTES = 1 << 23
"""Below this the allocator's own memory is as good."""

_HAS_ADVICE = hasattr(mmap, "MADV_HUGEPAGE") and hasattr(mmap, "MADV_FREE")
_FLOAT_BYTES = 4

_kept: list[mmap.mmap] = []
"""At most one block, which no tensor uses."""


def room_for(like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Uninitialised float32 tensors with the names, shapes and devices of ``like``.

    Those on the CPU share one block of memory, without overlap: it lives as long as one of them does.
    """
    sizes = [tensor.numel() if tensor.device.type == "cpu" else 0 for tensor in like.values()]
    pieces = torch.split(_block(sum(sizes)), sizes)
    return {
        key: piece.view(tensor.shape)
        if tensor.device.type == "cpu"
        else torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device)
        for (key, tensor), piece in zip(like.items(), pieces, strict=True)
    }


def forget() -> None:
    """Give the block that is kept, if there is one, back to the system now."""
    _kept.clear()


def _block(numel: int) -> Tensor:
    size_bytes = numel * _FLOAT_BYTES
    if not _HAS_ADVICE or size_bytes < SMALLEST_BYTES:
        return torch.empty(numel, dtype=torch.float32)
    block = _mapped(size_bytes)
    view = memoryview(block)
    # The tensor holds the view, and nothing else does: it goes when the last tensor of the block goes.
    weakref.finalize(view, _keep, block).atexit = False
    return torch.frombuffer(view, dtype=torch.float32, count=numel)


def _mapped(size_bytes: int) -> mmap.mmap:
    while _kept:
        block = _kept.pop()
        if len(block) == size_bytes:
            return block
    block = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel that was built without large pages
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _keep(block: mmap.mmap) -> None:
    with suppress(OSError):  # a kernel that cannot take it back at need: the block goes with its last tensor
        block.madvise(mmap.MADV_FREE)
        _kept[:] = [block]
