"""What a snapshot of the accumulator is, and the records of how it came about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trainwarden.checkpoint import Checkpoint
from trainwarden.errors import SLAOCheckpointError

Action = Literal["start", "merge", "rollback"]
Kept = Literal["current", "kept", "retired", "damaged"]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Record:
    """One line of the history.

    Attributes:
        sequence: the number of the snapshot, from 1; never reused.
        action: ``start`` (the first adapter), ``merge``, or ``rollback``.
        index: how many adapters the accumulator then held.
        weight: λ of the newest adapter.
        mode: as in `MergePolicy`; likewise ``schedule``.
        source: how the adapter was called; for a rollback, the snapshot gone back to.
        digest: of the newest adapter as it was trained.
        recorded_lineage: whether the adapter said, and rightly, that it was started from the one before it.
        overlap: without that, how far its A subspaces overlap with those before: mean over the layers, 0 to 1.
        norms: of all B together: ``before``, ``incoming``, ``after``.
        created_at: UTC.
        kept: whether the snapshot can be gone back to, now.
    """

    sequence: int
    action: Action
    index: int
    weight: float
    mode: str
    schedule: str
    source: str
    digest: str
    recorded_lineage: bool
    overlap: float | None
    norms: Mapping[str, float]
    created_at: str
    kept: Kept = "kept"

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> Record:
        """The record that `to_json` made. Raises KeyError and TypeError."""
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name != "kept"})

    def to_json(self) -> dict[str, Any]:
        """As it is stored: without ``kept``, which is a fact about today."""
        values = asdict(self)
        del values["kept"]
        return values


@dataclass(frozen=True)
class Snapshot:
    """A committed accumulator.

    Attributes:
        sequence: its number.
        index: how many adapters are in it.
        merged: the accumulator, float32.
        finetuned: the newest adapter as it was trained, in its dtypes: the next task starts from it.
        dtypes: in which the adapter of each key is trained and exported.
        config: peft's configuration of all adapters in it.
        history: records up to this one.
        path: its directory; before its commit that of the last committed one, or None.
    """

    sequence: int
    index: int
    merged: dict[str, Tensor]
    finetuned: dict[str, Tensor]
    dtypes: dict[str, torch.dtype]
    config: dict[str, Any]
    history: tuple[Record, ...]
    path: Path | None

    @property
    def digest(self) -> str:
        """Of the newest adapter as it was trained: what the next one says it was started from."""
        return self.history[-1].digest

    def exported(self) -> dict[str, Tensor]:
        """The merged adapter in the dtypes that adapters of this lineage have."""
        return {key: value.to(self.dtypes[key]) for key, value in self.merged.items()}


def now() -> str:
    """The time as records have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def parts_of(snapshot: Snapshot) -> dict[str, dict[str, Tensor]]:
    """What is stored. A tensor that merging has only replaced is stored once: the other is made of it."""
    own = {key: value for key, value in snapshot.finetuned.items() if not _same(snapshot.merged[key], value)}
    return {"merged": snapshot.merged, "finetuned": own}


def meta_of(snapshot: Snapshot) -> dict[str, Any]:
    """The JSON beside the tensors."""
    return {
        "kind": "slao",
        "format_version": FORMAT_VERSION,
        "index": snapshot.index,
        "config": snapshot.config,
        "dtypes": {key: str(dtype).removeprefix("torch.") for key, dtype in snapshot.dtypes.items()},
        "history": [record.to_json() for record in snapshot.history],
    }


def snapshot_of(checkpoint: Checkpoint) -> Snapshot:
    """The snapshot that was stored. Raises SLAOCheckpointError when a verified checkpoint is something else."""
    meta = checkpoint.meta
    if meta.get("kind") != "slao" or meta.get("format_version") != FORMAT_VERSION:
        problem = "it is not a snapshot of this format"
        raise SLAOCheckpointError(operation="load", path=checkpoint.path, problem=problem)
    try:
        dtypes = {key: getattr(torch, name) for key, name in meta["dtypes"].items()}
        merged, own = checkpoint.parts["merged"], checkpoint.parts["finetuned"]
        return Snapshot(
            sequence=checkpoint.step,
            index=int(meta["index"]),
            merged=dict(merged),
            finetuned={key: own[key] if key in own else merged[key].to(dtypes[key]) for key in merged},
            dtypes=dtypes,
            config=meta["config"],
            history=tuple(Record.of_json(record) for record in meta["history"]),
            path=checkpoint.path,
        )
    except (KeyError, TypeError, AttributeError) as error:
        problem = f"its entries make no sense ({error})"
        raise SLAOCheckpointError(operation="load", path=checkpoint.path, problem=problem) from error


def _same(merged: Tensor, finetuned: Tensor) -> bool:
    return torch.equal(merged, finetuned.to(torch.float32))
