"""State trees to store, and what it means for two of them to be the same."""

from __future__ import annotations

import collections
import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainwarden.checkpoint import Checkpoint, CheckpointStore, decode, encode
from trainwarden.checkpoint.tensorfile import read_tensors, serialise


def round_trip(tree: Any) -> Any:
    """`tree` through the bytes that a checkpoint would consist of."""
    tensors, skeleton = encode(tree)
    content = b"".join(bytes(piece) for piece in serialise(tensors))
    read = read_tensors(io.BytesIO(content), len(content), seen=bytearray().extend)
    return decode(read, json.loads(json.dumps(skeleton)))


def same(one: Any, other: Any) -> bool:
    """Equal in type, structure, order and every bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return same_tensor(one, other)
    if isinstance(one, np.ndarray | np.generic):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, float):
        return struct.pack("d", one) == struct.pack("d", other)
    if isinstance(one, complex):
        return same(one.real, other.real) and same(one.imag, other.imag)
    if isinstance(one, dict):
        factories = getattr(one, "default_factory", None) is getattr(other, "default_factory", None)
        pairs = zip(one.items(), other.items(), strict=False)
        return factories and len(one) == len(other) and all(same(a, b) for a, b in pairs)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, set):
        return len(one) == len(other) and sorted(map(repr, one)) == sorted(map(repr, other))
    return bool(one == other)


def same_tensor(one: torch.Tensor, other: torch.Tensor) -> bool:
    def content(tensor: torch.Tensor) -> bytes:
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        return plain.view(torch.uint8).numpy().tobytes()

    return one.dtype == other.dtype and one.shape == other.shape and content(one) == content(other)


def state_of(step: int) -> dict[str, Any]:
    """The parts of a small run at `step`, different for every step."""
    weight = torch.full((3, 4), float(step))
    return {
        "model": collections.OrderedDict({"weight": weight, "tied": weight, "count": torch.tensor(step), "step": step}),
        "optimizer": {
            "state": {0: {"exp_avg": torch.arange(5) + step}},
            "param_groups": [{"lr": 0.1 / step}],
        },
    }


def saved(directory: Path, *steps: int, keep_last: int = 100) -> CheckpointStore:
    """A store with a checkpoint of each of `steps`."""
    store = CheckpointStore(directory, keep_last=keep_last)
    for step in steps:
        store.save(step, state_of(step), {"step": step})
    return store


def newest(directory: Path, rejected: list[tuple[str, str]] | None = None) -> Checkpoint | None:
    """What a new process would resume from; fails when something is rejected that the test did not expect."""
    reasons: list[tuple[str, str]] = [] if rejected is None else rejected
    store = CheckpointStore(directory)
    checkpoint = store.load_newest(on_rejected=lambda path, reason: reasons.append((path.name, reason)))
    if rejected is None:
        assert reasons == []
    return checkpoint


def is_intact(checkpoint: Checkpoint) -> bool:
    """Whether it is, whole and bit for bit, the state of the step that it says it is of."""
    expected = state_of(checkpoint.step)
    tied = checkpoint.parts["model"]["tied"] is checkpoint.parts["model"]["weight"]
    return tied and same(checkpoint.parts, expected) and checkpoint.meta == {"step": checkpoint.step}
