"""From shallow traces to the full depth: each moment's memory is extended on its own line, and the line checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from trainwarden.memory.prediction import KINDS, PHASES, Kind, Phase
from trainwarden.memory.trace_place import Moment
from trainwarden.memory.trace_record import BEGINNING, Record
from trainwarden.memory.trace_replay import Point, Prices, breakdown, timeline

Place = tuple[int, str, str, bool]
"""Phase, canonical block, canonical block left last, whether recomputing."""
Key = tuple[Place, int]
"""A place, and the how-manieth allocating operator there."""

Pricing = Callable[[Record], Prices]

ENDS = 2
"""Blocks at each end of a stack that are told apart. The first often differs: nothing before it needs a gradient."""
TOLERANCE = 1e-4
"""Of the total, between a middle block and the line through its neighbours. Only the allocator's granules need it."""

SCALAR_BYTES = 64
"""Results below this (norms, counters) mark no moment of their own when traces are extended: their number varies with
the number of parameters, in places that are no block's."""


class NotLinearError(Exception):
    """The shallow traces do not fit one line, so the whole stack must be traced."""


@dataclass(frozen=True)
class Peaks:
    """The highest moment of each phase; ``operation`` and ``kinds`` are those of the highest of all."""

    phases: dict[Phase, int]
    phase: Phase
    operation: str | None
    kinds: dict[Kind, int]


@dataclass(frozen=True)
class Shallow:
    """A trace, and how many blocks each stack had in it (by the stack's qualified name)."""

    record: Record
    depths: Mapping[str, int]

    @property
    def last_units(self) -> tuple[str, ...]:
        """The last block of each stack."""
        return tuple(_block(path, depth - 1) for path, depth in self.depths.items())

    def points(self, prices: Prices, *, least_bytes: int = 0) -> dict[Key, Point]:
        """Every operator that allocates at least so much, under a key that it has at any depth."""
        counts: Counter[Place] = Counter()
        found: dict[Key, Point] = {}
        for point in timeline(self.record, prices):
            stored = self.record.storages[point.index]
            if stored.bytes < least_bytes and self.record.operators[point.index] != BEGINNING:
                continue
            place = self._place(stored.born)
            found[place, counts[place]] = point
            counts[place] += 1
        return found

    def operation(self, point: Point, target: Mapping[str, int]) -> str | None:
        """The operator, and where it runs when the stacks have their full depth; ``None`` where a phase begins."""
        born = self.record.storages[point.index].born
        operator = self.record.operators[point.index]
        if born.phase not in ("forward", "backward"):
            return operator or None
        path, _, number = born.unit.rpartition(".")
        module = born.module
        if path in target and int(number) >= self.depths[path] - ENDS:
            full = _block(path, target[path] - self.depths[path] + int(number))
            module = full + module.removeprefix(born.unit)
        link = " in the backward pass of " if born.phase == "backward" and not born.recomputing else " in "
        return f"{operator}{link}{module or 'the model'}" if operator else None

    def _place(self, born: Moment) -> Place:
        after = "" if born.unit else self._canonical(born.after)
        return born.serial, self._canonical(born.unit), after, born.recomputing

    def _canonical(self, unit: str) -> str:
        path, _, number = unit.rpartition(".")
        if path not in self.depths or not number.isdigit():
            return unit
        index, depth = int(number), self.depths[path]
        if index < ENDS:
            return f"{path} first {index}"
        return f"{path} last {depth - index}" if index >= depth - ENDS else f"{path} middle"


def extend(base: Shallow, deeper: Mapping[str, Shallow], target: Mapping[str, int], price: Pricing) -> Peaks:
    """The peaks when the stacks are as deep as ``target`` says.

    ``deeper`` has, for each stack to be extended, a trace with one block more than ``base``; without any, the peaks
    are those of ``base`` itself. Raises NotLinearError.
    """
    prices = price(base.record)
    least = SCALAR_BYTES if deeper else 0
    points = base.points(prices, least_bytes=least)
    others = {path: trace.points(price(trace.record), least_bytes=least) for path, trace in deeper.items()}
    for path, other in others.items():
        _check(points, other, path)
    more = {path: target[path] - base.depths[path] for path in deeper}
    totals = {
        key: point.total_bytes
        + sum(more[path] * (others[path][key].total_bytes - point.total_bytes) for path in deeper)
        for key, point in points.items()
    }
    phases: dict[Phase, int] = dict.fromkeys(PHASES, 0)
    for key, total in totals.items():
        phase = base.record.storages[points[key].index].born.phase
        phases[phase] = max(phases[phase], total)
    best = max(totals, key=totals.__getitem__)
    kinds = own = breakdown(base.record, prices, points[best], base.last_units)
    for path, trace in deeper.items():
        there = breakdown(trace.record, price(trace.record), others[path][best], trace.last_units)
        kinds = {kind: kinds[kind] + more[path] * (there[kind] - own[kind]) for kind in KINDS}
    if min(kinds.values()) < 0 or sum(kinds.values()) != totals[best]:
        raise NotLinearError("the kinds of memory do not fit one line")
    phase = base.record.storages[points[best].index].born.phase
    return Peaks(phases, phase, base.operation(points[best], target), kinds)


def _check(base: Mapping[Key, Point], deeper: Mapping[Key, Point], path: str) -> None:
    """Both depths have the same moments, and those of the deeper trace's middle block lie between its neighbours'."""
    middle = {key for key in deeper if f"{path} middle" in (key[0][1], key[0][2])}
    if set(base) != set(deeper) - middle:
        raise NotLinearError(f"other operators run when {path} is deeper")
    for (serial, unit, after, recomputing), count in middle:
        sides = []
        for end in (f"{path} first {ENDS - 1}", f"{path} last {ENDS}"):
            place = (serial, unit.replace(f"{path} middle", end), after.replace(f"{path} middle", end), recomputing)
            if (place, count) not in deeper:
                raise NotLinearError(f"the blocks of {path} run other operators")
            sides.append(deeper[place, count].total_bytes)
        total = deeper[(serial, unit, after, recomputing), count].total_bytes
        if abs(2 * total - sum(sides)) > 2 * TOLERANCE * total:
            raise NotLinearError(f"the blocks of {path} need different amounts of memory")


def _block(path: str, index: int) -> str:
    return f"{path}.{index}" if path else str(index)
