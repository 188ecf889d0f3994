"""From births and deaths to a timeline: how much is alive after each birth, where that was, and what it consists of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from trainwarden.memory.prediction import KINDS, Kind
from trainwarden.memory.trace_place import Moment
from trainwarden.memory.trace_record import Label, Record, Stored

LABELS: dict[Label, Kind] = {
    "weights": "weights",
    "buffers": "weights",
    "batch": "activations",
    "gradients": "gradients",
    "optimizer_states": "optimizer_states",
}


@dataclass(frozen=True, slots=True)
class Prices:
    """What a storage costs on the device. ``extra`` is what the record does not have, by kind, after an event."""

    of_storage: Callable[[Stored], int]
    extra: Callable[[int, Moment], dict[Kind, int]]


@dataclass(frozen=True, slots=True)
class Point:
    """The device's bytes right after the operator that ends with storage ``index``."""

    index: int
    event: int
    total_bytes: int


def rounded(nbytes: int, granule_bytes: int) -> int:
    """``nbytes`` as the allocator hands it out: CUDA's in multiples of 512, the CPU's exactly."""
    return -(-nbytes // granule_bytes) * granule_bytes


def timeline(record: Record, prices: Prices) -> Iterator[Point]:
    """A point for each operator that allocates, in order: the outputs of one operator are alive together."""
    total = 0
    for event, signed in enumerate(record.events):
        index = abs(signed) - 1
        stored = record.storages[index]
        if signed < 0:
            total -= prices.of_storage(stored)
            continue
        total += prices.of_storage(stored)
        if event in record.unlike:
            continue
        following = record.storages[index + 1] if index + 1 < len(record.storages) else None
        if following is None or following.call != stored.call:
            yield Point(index, event, total + sum(prices.extra(event, stored.born).values()))


def breakdown(record: Record, prices: Prices, point: Point, last_units: Collection[str]) -> dict[Kind, int]:
    """What is alive at ``point``, by kind. Behind ``last_units``, the last blocks of the stacks, lies the head."""
    alive: set[int] = set()
    for signed in record.events[: point.event + 1]:
        if signed > 0:
            alive.add(signed - 1)
        else:
            alive.discard(-signed - 1)
    found: dict[Kind, int] = dict.fromkeys(KINDS, 0)
    for index in alive:
        stored = record.storages[index]
        found[_kind(stored, last_units)] += prices.of_storage(stored)
    for kind, nbytes in prices.extra(point.event, record.storages[point.index].born).items():
        found[kind] += nbytes
    return found


def _kind(stored: Stored, last_units: Collection[str]) -> Kind:
    if stored.label is not None:
        return LABELS[stored.label]
    born = stored.born
    if born.phase in ("forward", "backward") and not born.unit and born.after in last_units:
        return "logits_and_loss"
    if born.recomputing or stored.died != born.serial:
        return "activations"
    return "temporaries"
