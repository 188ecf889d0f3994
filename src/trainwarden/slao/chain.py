"""Merge several saved adapters in their order: all of them are checked before the first byte is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trainwarden.errors import AdapterNotFoundError, SLAOMergeError, UsageError

from . import export
from .adapter import read_adapter
from .policy import MergePolicy
from .records import Record, Snapshot
from .store import OnRejected, SlaoStore
from .transaction import Proposal, propose_first, propose_next


@dataclass(frozen=True)
class ChainStep:
    """One adapter of a chain: what its merge will be recorded as, and what a person should know."""

    record: Record
    notes: tuple[str, ...]


def merge_adapters(
    sources: Sequence[str | Path],
    output: str | Path,
    policy: MergePolicy | None = None,
    *,
    on_rejected: OnRejected | None = None,
) -> tuple[Snapshot, list[ChainStep]]:
    """Merge saved adapters into ``output``: the first is the accumulator's start, the i-th comes in with λ(i).

    Every adapter is read, checked and merged once without writing, so that one that is bad, wherever it stands,
    leaves ``output`` as it was; then again with a commit each, and one export at the end. When the first one is
    the output of an earlier merge, that accumulator is continued, with its count; with itself as ``output``, in
    place. A new chain into an older output keeps the older history, which can be gone back to.

    Returns the committed accumulator, and a step for each adapter that was merged.

    Raises:
        UsageError: fewer than two adapters.
        InvalidSettingError: ``output`` holds something that merging did not write.
        AdapterNotFoundError, SLAOMergeError, SLAOMergeDivergedError: of the first adapter that is not good.
        SLAOCheckpointError, DiskFullError, RunLockedError: as `SlaoStore.commit`.
    """
    if len(sources) < 2:
        raise UsageError(problem="give at least two adapters: the first is what the others are merged into")
    export.require_ours(Path(output))
    store = SlaoStore(output, on_rejected=on_rejected)
    chain = _Chain([Path(source) for source in sources], store, policy or MergePolicy(), on_rejected)
    rehearsed: list[ChainStep] = []

    def rehearse(proposal: Proposal) -> Snapshot:
        rehearsed.append(ChainStep(proposal.record, proposal.notes))
        return proposal.preview()

    chain.walk(rehearse, measure_overlap=True)
    left = iter(rehearsed)

    def commit(proposal: Proposal) -> Snapshot:
        step = next(left)
        if step.record.digest != proposal.record.digest:
            raise SLAOMergeError(adapter=proposal.record.source, problem="it was changed while it was being merged")
        committed = store.commit(replace(proposal, record=step.record), exported=len(done) + 1 == len(rehearsed))
        done.append(replace(step, record=committed.history[-1]))
        return committed

    done: list[ChainStep] = []
    with store.writing():
        snapshot = chain.walk(commit, measure_overlap=False)
    return snapshot, done


class _Chain:
    """A walk over the adapters that can be made twice, one adapter in memory at a time."""

    def __init__(
        self, sources: Sequence[Path], store: SlaoStore, policy: MergePolicy, on_rejected: OnRejected | None
    ) -> None:
        self._sources = sources
        self._store = store
        self._policy = policy
        self._on_rejected = on_rejected

    def walk(self, settle: Callable[[Proposal], Snapshot], *, measure_overlap: bool) -> Snapshot:
        """Merge one after the other; ``settle`` makes each proposal what the next is computed from."""
        snapshot = self._begin(settle)
        for source in self._sources[1:]:
            adapter = read_adapter(source)
            snapshot = settle(propose_next(snapshot, adapter, self._policy, measure_overlap=measure_overlap))
        return snapshot

    def _begin(self, settle: Callable[[Proposal], Snapshot]) -> Snapshot:
        first, head = self._sources[0], self._store.current()
        if not export.is_ours(first):
            return settle(propose_first(read_adapter(first), self._policy, after=head))
        if first.resolve() == self._store.path.resolve():
            return _required(head, first)
        return settle(
            _planted(_required(SlaoStore(first, on_rejected=self._on_rejected).current(), first), first, head)
        )


def _required(snapshot: Snapshot | None, path: Path) -> Snapshot:
    if snapshot is None:
        raise AdapterNotFoundError(what="merge history", path=path, problem="nothing has been merged yet")
    return snapshot


def _planted(snapshot: Snapshot, source: Path, head: Snapshot | None) -> Proposal:
    """Another store's accumulator as the start of this one, with its count of adapters."""
    return Proposal(
        parent=head.sequence if head else 0,
        merged=snapshot.merged,
        finetuned=snapshot.finetuned,
        config=snapshot.config,
        history=head.history if head else (),
        record=replace(snapshot.history[-1], action="start", source=str(source)),
        overlaps={},
        notes=(),
        parent_path=head.path if head else None,
    )
