"""From a trained adapter to a committed merge: `propose` reads, checks and computes; `SlaoStore.commit` writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from trainwarden.checkpoint.durable import fsync_directory, replace_file, save_errors
from trainwarden.errors import SLAOMergeDivergedError

from .adapter import LINEAGE_FILE, Adapter, adapter_of, check, read_adapter, refuse
from .checks import config_problems
from .factors import Kind, short
from .merging import MergeResult, begin, merge
from .norms import total
from .orthogonal import init_adapter, overlap
from .peft_api import install
from .policy import MergePolicy
from .records import Record, Snapshot, now
from .store import SlaoStore


@dataclass(frozen=True)
class Start:
    """Where a task starts from: `next_start` makes it, `propose` and `record_lineage` take it.

    Attributes:
        index: the number that its adapter will have.
        started_from: the digest of the adapter before it, as it was trained.
    """

    index: int
    started_from: str


@dataclass(frozen=True)
class Proposal:
    """A merge that was computed and checked, and is nowhere yet: commit it, or drop it.

    Attributes:
        parent: the snapshot it was computed from; 0 for the first adapter.
        merged: the new accumulator, float32.
        finetuned: the new adapter as it was trained.
        config: peft's configuration, of the first adapter.
        history: records of the parent.
        record: of this merge; its sequence number is given at the commit.
        overlaps: without a recorded lineage, how far the A subspace of each layer overlaps with the one before.
        notes: what a person should know, one sentence each.
        parent_path: the directory of the parent, the last good snapshot.
    """

    parent: int
    merged: dict[str, Tensor]
    finetuned: dict[str, Tensor]
    config: Mapping[str, Any]
    history: tuple[Record, ...]
    record: Record
    overlaps: Mapping[str, float]
    notes: tuple[str, ...]
    parent_path: Path | None

    def preview(self) -> Snapshot:
        """What a commit would make of it: already good to evaluate, or to compute the next merge from."""
        return Snapshot(
            sequence=self.parent + 1,
            index=self.record.index,
            merged=self.merged,
            finetuned=self.finetuned,
            dtypes={key: value.dtype for key, value in self.finetuned.items()},
            config=dict(self.config),
            history=(*self.history, self.record),
            path=self.parent_path,
        )


def propose(
    store: SlaoStore,
    adapter: Any,
    policy: MergePolicy | None = None,
    *,
    adapter_name: str = "default",
    source: str | None = None,
    start: Start | None = None,
) -> Proposal:
    """Merge an adapter into the accumulator of ``store``, without writing anything.

    Args:
        adapter: a live peft model, a directory that peft's `save_pretrained` wrote, or an `Adapter`.
        adapter_name: which one of a live model's.
        source: how messages and the history call it; by default the directory, or "model".
        start: what `next_start` returned before this adapter was trained. A directory says it itself when
            `record_lineage` has noted it there.

    Raises:
        AdapterNotFoundError, SLAOMergeError: there is no such adapter, or it does not fit.
        SLAOMergeDivergedError: it, or the result, is not finite or has grown too much; ``checkpoint_path`` is the
            last good snapshot.
        SLAOCheckpointError: the accumulator cannot be read.
    """
    snapshot, taken = store.current(), _taken(adapter, adapter_name, source)
    return propose_first(taken, policy) if snapshot is None else propose_next(snapshot, taken, policy, start=start)


def propose_next(
    snapshot: Snapshot,
    adapter: Adapter,
    policy: MergePolicy | None = None,
    *,
    start: Start | None = None,
    measure_overlap: bool = True,
) -> Proposal:
    """`propose` on a snapshot at hand. Measuring the overlap takes two QR decompositions a layer."""
    policy, index = policy or MergePolicy(), snapshot.index + 1
    check(adapter)
    refuse(adapter.source, config_problems(adapter.config, snapshot.config), index)
    try:
        result = merge(snapshot.merged, adapter.tensors, index, policy, dtypes=snapshot.dtypes, source=adapter.source)
    except SLAOMergeDivergedError as error:
        raise error.add_context(checkpoint_path=snapshot.path) from None
    started_from = start.started_from if start else adapter.started_from
    lineage = started_from == snapshot.digest
    overlaps = {} if lineage or not measure_overlap else overlap(snapshot.finetuned, adapter.tensors)
    return Proposal(
        parent=snapshot.sequence,
        merged=result.tensors,
        finetuned=dict(adapter.tensors),
        config=snapshot.config,
        history=snapshot.history,
        record=_record(adapter, result, policy, lineage, overlaps),
        overlaps=overlaps,
        notes=_notes(adapter, snapshot, started_from, overlaps),
        parent_path=snapshot.path,
    )


def propose_first(adapter: Adapter, policy: MergePolicy | None = None, *, after: Snapshot | None = None) -> Proposal:
    """A new accumulator; ``after`` is what the store held before, whose history stays."""
    check(adapter)
    result = begin(adapter.tensors, source=adapter.source)
    return Proposal(
        parent=after.sequence if after else 0,
        merged=result.tensors,
        finetuned=dict(adapter.tensors),
        config=adapter.config,
        history=after.history if after else (),
        record=_record(adapter, result, policy or MergePolicy(), False, {}),
        overlaps={},
        notes=(),
        parent_path=after.path if after else None,
    )


def merge_trained(
    store: SlaoStore,
    adapter: Any,
    policy: MergePolicy | None = None,
    *,
    adapter_name: str = "default",
    source: str | None = None,
    start: Start | None = None,
) -> Snapshot:
    """Merge a trained adapter and commit it, or leave everything as it was. Takes and raises what `propose` does
    and what `SlaoStore.commit` raises.
    """
    return store.commit(propose(store, adapter, policy, adapter_name=adapter_name, source=source, start=start))


def next_start(store: SlaoStore, model: Any, *, adapter_name: str = "default") -> Start | None:
    """Put the start of the next task into a live peft model: A orthonormal, the rest of the last adapter as trained.

    None, and the model untouched, when nothing has been merged yet: the first task starts as peft makes it.

    Raises:
        SLAOCheckpointError: the accumulator cannot be read.
        SLAOMergeError: the model has another configuration or other layers than the accumulator.
    """
    snapshot = store.current()
    if snapshot is None:
        return None
    here = adapter_of(model, adapter_name)
    refuse(adapter_name, config_problems(here.config, snapshot.config), snapshot.index + 1)
    install(model, init_adapter(snapshot.finetuned), adapter_name)
    return Start(index=snapshot.index + 1, started_from=snapshot.digest)


def record_lineage(directory: str | Path, start: Start | None) -> None:
    """Note beside a saved adapter what its training was started from; nothing for the first task's None.

    Raises AdapterNotFoundError when there is no adapter, CheckpointError and DiskFullError.
    """
    if start is None:
        return
    path = Path(directory) / LINEAGE_FILE
    content = json.dumps({"started_from": start.started_from, "index": start.index}, indent=2) + "\n"
    with save_errors(path, needed_bytes=len(content)):
        replace_file(path, [content.encode()])
        fsync_directory(path.parent)


def _taken(adapter: Any, adapter_name: str, source: str | None) -> Adapter:
    if isinstance(adapter, Adapter):
        found = adapter
    elif isinstance(adapter, str | Path):
        found = read_adapter(adapter)
    else:
        found = adapter_of(adapter, adapter_name)
    return found if source is None else replace(found, source=source)


def _record(
    adapter: Adapter, result: MergeResult, policy: MergePolicy, lineage: bool, overlaps: Mapping[str, float]
) -> Record:
    return Record(
        sequence=0,  # given at the commit
        action="start" if result.index == 1 else "merge",
        index=result.index,
        weight=result.weight,
        mode=policy.mode,
        schedule=policy.schedule_name,
        source=adapter.source,
        digest=adapter.digest(),
        recorded_lineage=lineage,
        overlap=fmean(overlaps.values()) if overlaps else None,
        norms=total(result.norms, Kind.B),
        created_at=now(),
    )


def _notes(
    adapter: Adapter, snapshot: Snapshot, started_from: str | None, overlaps: Mapping[str, float]
) -> tuple[str, ...]:
    notes, index = [], snapshot.index + 1
    if overlaps:
        mean, low = fmean(overlaps.values()), min(overlaps, key=overlaps.__getitem__)
        why = "says that it was started from another adapter" if started_from else "has no recorded lineage"
        notes.append(
            f"adapter {index} ({adapter.source}) {why}; its A subspaces overlap by {mean:.2f} on average with those of "
            f"adapter {snapshot.index} (least {overlaps[low]:.2f}, {short(low)}), where 1 is the same subspace and 0 "
            "none in common. What the B of earlier adapters does outside the overlap is lost"
        )
    own, other = (config.get("base_model_name_or_path") for config in (adapter.config, snapshot.config))
    if own and other and own != other:
        notes.append(f"adapter {index} ({adapter.source}) was trained on {own}, the first one on {other}")
    return tuple(notes)
