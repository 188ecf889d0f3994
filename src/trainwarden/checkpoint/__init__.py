"""Capture, store, verify, restore: the newest verified state of a run survives whatever ends it."""

from .codec import decode, encode
from .manifest import Manifest
from .rng import capture_rng, restore_rng
from .store import CheckpointStore
from .verify import Checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "Manifest",
    "capture_rng",
    "decode",
    "encode",
    "restore_rng",
]
