"""What a rank holds when FSDP2 (``fully_shard`` on every block and on the model) shards a model that was traced whole.

Weights, gradients, optimizer states and the optimizer's temporaries are divided by the number of ranks; activations
are not. On top comes what is gathered for a while, by the rules of ``fully_shard`` with its defaults:

- the parameters outside the blocks (embeddings, head) stay gathered from the first forward to the end of the backward
  pass, where their gradients are whole as well;
- in the forward pass three blocks are whole: the one that runs, the next one, and the buffer that one of them was
  copied from; in the backward pass two, the one that runs and the one before it, which is prefetched, and behind the
  blocks only the last one;
- a gradient is whole from its birth until its block is through, one outside the blocks until the backward pass ends;
- the input of a block's reduce-scatter is held while the next block runs backward.

With CPU offloading, whatever is sharded lies in host memory, and the optimizer runs there.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainwarden.memory.prediction import Kind
from trainwarden.memory.trace_place import UNIT_FREE, Moment
from trainwarden.memory.trace_record import Label, Record, Stored
from trainwarden.memory.trace_replay import Prices, rounded

SHARDED: frozenset[Label] = frozenset({"weights", "gradients", "optimizer_states"})
FORWARD_BLOCKS = 3


@dataclass(frozen=True)
class Sharding:
    """``world_size`` ranks share the model; offloading makes sense with a single one as well."""

    world_size: int = 1
    cpu_offload: bool = False

    @property
    def active(self) -> bool:
        return self.world_size > 1 or self.cpu_offload


def prices_of(record: Record, sharding: Sharding, granule_bytes: int) -> Prices:
    """What storages and moments of ``record`` cost on one rank's device."""

    def of_storage(stored: Stored) -> int:
        if stored.paged:
            return 0
        if not sharding.active or not _sharded(stored):
            return rounded(stored.bytes, granule_bytes)
        return 0 if sharding.cpu_offload else rounded(-(-stored.bytes // sharding.world_size), granule_bytes)

    if not sharding.active:
        return Prices(of_storage, lambda *_: {})
    gathered = _Gathered(record)
    return Prices(of_storage, gathered.at)


def host_bytes(record: Record, sharding: Sharding) -> int:
    """Bytes in host memory per rank: what is offloaded, and paged optimizer states."""
    kept = sum(stored.bytes for stored in record.storages if stored.paged)
    if sharding.cpu_offload:
        kept += sum(stored.bytes for stored in _resident(record)) // sharding.world_size
    return kept


def _sharded(stored: Stored) -> bool:
    if stored.label is None:
        return stored.born.phase == "optimizer"
    return stored.label in SHARDED


def _resident(record: Record) -> list[Stored]:
    """Weights, one set of gradients, and optimizer states: gradients are born anew in each step."""
    seen: dict[int, Stored] = {}
    kept = [s for s in record.storages if s.label in ("weights", "optimizer_states") and not s.paged]
    for stored in record.storages:
        if stored.label == "gradients":
            seen.setdefault(stored.owner, stored)
    return kept + list(seen.values())


class _Gathered:
    """Whole parameters and gradients beside the shards, at each moment."""

    def __init__(self, record: Record) -> None:
        self._weights: dict[str, int] = {UNIT_FREE: 0}
        self._gradients: dict[tuple[int, str], list[tuple[int, int]]] = {}
        for event, signed in enumerate(record.events):
            stored = record.storages[abs(signed) - 1]
            if signed > 0 and stored.label == "weights":
                self._weights[stored.unit] = self._weights.get(stored.unit, 0) + stored.bytes
            elif signed > 0 and stored.label == "gradients":
                self._gradients.setdefault((stored.born.serial, stored.unit), []).append((event, stored.bytes))
        self._order = [unit for unit in self._weights if unit != UNIT_FREE]

    def at(self, event: int, moment: Moment) -> dict[Kind, int]:
        if moment.phase not in ("forward", "backward"):
            return {}
        gathered = self._weights[UNIT_FREE] + sum(self._weights[unit] for unit in self._near(moment))
        if moment.phase == "forward":
            return {"weights": gathered}
        whole = self._born(event, moment.serial, UNIT_FREE)
        if moment.unit:
            whole += self._born(event, moment.serial, moment.unit)
        return {"weights": gathered, "gradients": whole + self._reducing(event, moment)}

    def _near(self, moment: Moment) -> list[str]:
        """The blocks that are whole, the running one (or the one left last) included."""
        here = moment.unit or moment.after
        if here not in self._order:
            return self._order[: FORWARD_BLOCKS - 1]
        index = self._order.index(here)
        if moment.phase == "forward":
            return self._order[index : index + FORWARD_BLOCKS]
        return self._order[max(index - 1, 0) : index + 1] if moment.unit else [here]

    def _reducing(self, event: int, moment: Moment) -> int:
        """Gradients of the block that ran backward just before."""
        if moment.unit not in self._order or moment.unit == self._order[-1]:
            return 0
        return self._born(event, moment.serial, self._order[self._order.index(moment.unit) + 1])

    def _born(self, event: int, serial: int, unit: str) -> int:
        """Bytes of a unit's gradients that were born in this backward pass until now."""
        return sum(nbytes for born, nbytes in self._gradients.get((serial, unit), []) if born <= event)


def peak_note(sharding: Sharding) -> str:
    """How the shards were found, for the notes of a prediction."""
    ranks = f"{sharding.world_size} rank{'s' if sharding.world_size > 1 else ''}"
    kept = ", whatever is sharded in host memory" if sharding.cpu_offload else ""
    return f"traced whole and divided among {ranks} by FSDP2's rules{kept}"


__all__ = ["Sharding", "host_bytes", "peak_note", "prices_of"]
