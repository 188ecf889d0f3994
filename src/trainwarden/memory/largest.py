"""The largest micro-batch, or the longest sequence, whose prediction stays within a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Largest:
    """The largest value that fits, proven by the next one that does not.

    Attributes:
        value: 0 when not even the least one fits.
        bytes_at_value: at most what the value needs (of the least one when ``value`` is 0).
        next_bytes: what the next larger value needs; None when the value is the most that was asked for.
        evaluations: how often the need was computed.
    """

    value: int
    bytes_at_value: int
    next_bytes: int | None
    evaluations: int


def largest(
    need_bytes: Callable[[int], int],
    budget_bytes: int,
    *,
    most: int,
    step: int = 1,
    guess: int | None = None,
    known: Mapping[int, int] | None = None,
) -> Largest:
    """The largest multiple of ``step`` up to ``most`` whose need is within ``budget_bytes``.

    ``need_bytes(value)`` must not fall as the value grows, and be convex: memory is the maximum of functions linear in
    the size of the batch, so a chord lies on or above it. What lies below the budget on a chord between two computed
    values is therefore known to fit without being computed. That the next value does not fit is always computed.

    Args:
        guess: where to look first, such as the answer of the closed form. A good one makes one or two evaluations.
        known: needs that have been computed before, by value.
    """
    search = _Search(need_bytes, budget_bytes, step, max(1, most // step))
    search.seen.update({value // step: need for value, need in (known or {}).items() if value % step == 0})
    before = len(search.seen)
    value = search.run(max(1, (guess or step) // step))
    return Largest(
        value=value * step,
        bytes_at_value=search.at_most(value) if value else search.seen[1],
        next_bytes=search.seen.get(value + 1) if value else search.seen[1],
        evaluations=len(search.seen) - before,
    )


class _Search:
    """In units of ``step``. ``low`` is known to fit, ``high`` not to; at first 0 and one more than the most."""

    def __init__(self, need_bytes: Callable[[int], int], budget_bytes: int, step: int, most: int) -> None:
        self._need_bytes = need_bytes
        self._budget_bytes = budget_bytes
        self._step = step
        self._most = most
        self.seen: dict[int, int] = {}

    def run(self, guess: int) -> int:
        """The largest that fits."""
        low, high = self._bounds()
        wanted = min(max(guess + 1, low + 1), high - 1)  # the successor of a right guess proves it
        while high - low > 1:
            self._compute(wanted)
            low, high = self._bounds()
            wanted = self._next(low, high, guess)
        return low

    def at_most(self, units: int) -> int:
        """What ``units``, known to fit, needs at most."""
        if units in self.seen:
            return self.seen[units]
        below, above = self._around(units)
        return self._chord(below, above, units)

    def _compute(self, units: int) -> None:
        self.seen[units] = self._need_bytes(units * self._step)

    def _bounds(self) -> tuple[int, int]:
        fitting = [units for units, need in self.seen.items() if need <= self._budget_bytes and units <= self._most]
        failing = [units for units, need in self.seen.items() if need > self._budget_bytes]
        low, high = max(fitting, default=0), min([*failing, self._most + 1])
        if low and high in self.seen and high - low > 1:
            low = max(low, min(self._crossing(low, high), high - 1))
        return low, high

    def _next(self, low: int, high: int, guess: int) -> int:
        if high - low <= 1:
            return low
        if low == 0:  # too large so far: what was guessed, else half
            return guess if 0 < guess < high and guess not in self.seen else max(1, high // 2)
        if high > self._most:  # everything fits so far: as far as the last slope carries, or twice as far
            return min(self._most, max(low + 1, self._ahead(low)))
        return low + 1 if low not in self.seen else max(low + 1, min(high - 1, self._crossing(low, high) + 1))

    def _ahead(self, low: int) -> int:
        below = max((units for units in self.seen if units < low), default=0)
        return min(self._crossing(below, low) + 1, 4 * low) if below else 2 * low

    def _crossing(self, first: int, second: int) -> int:
        """The last unit at which the line through two computed needs is within the budget."""
        rise = self.seen[second] - self.seen[first]
        if rise <= 0:
            return 2 * second
        return first + (self._budget_bytes - self.seen[first]) * (second - first) // rise

    def _around(self, units: int) -> tuple[int, int]:
        below = max(one for one in self.seen if one < units)
        return below, min(one for one in self.seen if one > units)

    def _chord(self, first: int, second: int, units: int) -> int:
        rise = self.seen[second] - self.seen[first]
        return self.seen[first] + -(-rise * (units - first) // (second - first))
