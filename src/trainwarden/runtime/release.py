"""The first remedy when memory runs out: give back what is held for nothing."""

from __future__ import annotations

import gc

import torch


def release_memory() -> None:
    """Collects garbage and returns the allocator's cache, and with it its fragments, to the device.

    Only useful once the traceback of a failed attempt is gone: its frames hold the activations.
    """
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
