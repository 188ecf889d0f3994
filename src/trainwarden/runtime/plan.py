"""`MicroBatchPlan`: what a run has learned about the micro-batches that fit, kept over checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainwarden.guards.memory_plan import (
    Bounds,
    Choice,
    Knowledge,
    MemoryLine,
    PlanPolicy,
    Size,
    bounds_from_state,
    bounds_to_state,
    choose,
    fit_line,
    shrink,
)
from trainwarden.guards.oom import MemoryFailure
from trainwarden.runtime.meter import MemoryMeter

OBSERVATIONS = 24
"""Observations that the line is fitted to, of different sizes; the oldest goes first."""

OBSERVE_ALWAYS = 8
"""Up to so many, every batch is observed; then those larger than any before, and one in `OBSERVE_EVERY`."""

OBSERVE_EVERY = 64

_WHOLE = Choice(None, "nothing has failed")


@dataclass
class MicroBatchPlan:
    """How large a micro-batch may be.

    ``used`` holds the sizes in rows already run in parts, ``shrinks`` counts all shrinks of the run,
    ``shrinks_this_step`` those of the step in hand, ``verified`` tells whether the loss was seen to split into
    weighted parts. ``choice`` is the newest decision with its reason, ``lesson`` the newest failure and the size that
    was tried instead. ``remedies`` names those of the user's own remedies that have been applied.
    """

    policy: PlanPolicy = field(default_factory=PlanPolicy)
    meter: MemoryMeter | None = None
    bounds: Bounds = field(default_factory=Bounds)
    used: set[int] = field(default_factory=set)
    shrinks: int = 0
    verified: bool = False
    shrinks_this_step: int = 0
    choice: Choice = _WHOLE
    lesson: tuple[Size, Size] | None = None
    remedies: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._observed: dict[int, int] = {}
        self._line: MemoryLine | None = None
        self._told_rows: int | None = None
        self._step_closed = False
        self._newest_fit: tuple[Size | None, Bounds] = None, self.bounds
        self._observing = False
        self._released_at: int | None = None
        self._batches = 0
        self._quiet_batches = 0
        self._failed_growths = 0
        self._climbing = False
        self._regrowing = False

    @property
    def limit(self) -> int | None:
        """Rows of the largest micro-batch that is tried at the length last seen; ``None`` while whole batches fit.

        Setting it says how many rows fit, at whatever length comes next, and that more do not.
        """
        return self._told_rows if self._told_rows is not None else self.choice.rows

    @limit.setter
    def limit(self, rows: int | None) -> None:
        self._told_rows = rows
        if rows is None:
            self.bounds, self.choice = Bounds(), _WHOLE

    @property
    def line(self) -> MemoryLine | None:
        """Bytes over tokens, once observations of different sizes tell it."""
        return self._line

    # -- before an attempt ---------------------------------------------------------------------------------------

    @property
    def has_failed(self) -> bool:
        """Whether any size is known or believed to fail."""
        return bool(self.bounds.fails) or self._told_rows is not None

    def choose(self, size: Size | None, *, may_grow: bool = True) -> Choice:
        """In what parts the next batch is run. ``None``: nothing is known about its size, and it is run whole.

        ``may_grow``: whether a failure of this batch could still be recovered.
        """
        self._batches += 1
        self._quiet_batches += 1
        self._regrowing = False
        if size is None or not (self.bounds.fails or self._line or self._told_rows):
            self.choice = _WHOLE
            return _WHOLE
        self._take_told(size)
        quiet = self._quiet_batches >= self._wait_batches
        known = Knowledge(self.bounds, self._line, self._room_bytes(size), quiet, may_grow)
        self.choice = choose(self.policy, known, size)
        self._regrowing = self.choice.growing and quiet
        return self.choice

    def precaution(self, size: Size) -> Choice:
        """From now on at most half of what is run now is tried, although nothing has failed."""
        rows = min(size.rows, self.limit or size.rows)
        half = -(-rows // 2)
        self.limit = half
        self._take_told(size)
        self._quiet_batches, self._climbing, self._regrowing = 0, False, False
        self.choice = Choice(half, "the device's memory is nearly full")
        self.shrinks += 1
        return self.choice

    def _take_told(self, size: Size) -> None:
        if self._told_rows is not None:
            rows, self._told_rows = self._told_rows, None
            failed = Size(rows + 1 + rows // 8, size.length)  # as far off as the policy keeps away from it
            self.bounds = self.bounds.with_failure(failed).with_fit(Size(rows, size.length))

    def _room_bytes(self, size: Size) -> int | None:
        """Asks the driver, so only where it can change the choice."""
        if self._line is None or self.meter is None or size.tokens <= self.bounds.fitting_tokens(size.length):
            return None
        return self.meter.room_bytes()

    @property
    def _wait_batches(self) -> int:
        return self.policy.growing_batches if self._climbing else self.policy.wait_batches(self._failed_growths)

    # -- an attempt and its outcome ------------------------------------------------------------------------------

    def begin_attempt(self, size: Size | None) -> None:
        """A micro-batch is about to run."""
        if self.meter is None or size is None:
            return
        self._observing = self._is_instructive(size)
        if self._observing:
            self.meter.begin()

    def note_fit(self, size: Size | None) -> int | None:
        """It ran through. Returns the rows known to fit before, where it is larger and was tried for that reason."""
        if size is None:
            return None
        if self._observing:
            self._observe(size)
        if size == self._newest_fit[0] and self.bounds is self._newest_fit[1]:
            return None
        fitting = self.bounds.fitting_tokens(size.length)
        self._newest_fit = size, self.bounds
        if size.tokens <= fitting:
            return None
        before = self.bounds
        self.bounds = before.grown_to(size) if self._regrowing else before.with_fit(size)
        if self._regrowing and self.bounds.fails != before.fails:
            self._quiet_batches, self._climbing, self._regrowing = 0, True, False
            self._failed_growths = max(0, self._failed_growths - 1)
        return max(1, fitting // size.length) if self.choice.growing else None

    def note_failure(self, size: Size, memory: MemoryFailure | None = None) -> Choice:
        """It ran out of memory. Returns the size to retry with: fewer rows, unless it was one row."""
        if self._regrowing:
            self._failed_growths += 1
        self._quiet_batches, self._climbing, self._regrowing = 0, False, False
        self.bounds = self.bounds.with_failure(size)
        known = Knowledge(self.bounds, self._line, self._room_bytes(size))
        again = self.shrinks_this_step > 0
        self.choice = shrink(self.policy, known, size, shortage_bytes=_shortage(memory), again=again)
        self.lesson = size, Size(self.choice.rows or size.rows, size.length)
        self.shrinks += 1
        self.shrinks_this_step += 1
        return self.choice

    def learn(self, lessons: Sequence[tuple[Size, Size]]) -> None:
        """Takes over the `lesson` of every rank that had one: their devices are like this one's."""
        self._quiet_batches, self._climbing = 0, False
        self.bounds = self.bounds.with_lessons(lessons)

    @property
    def released(self) -> bool:
        """Whether the allocator's cache has been returned for this batch."""
        return self._released_at == self._batches

    def note_release(self) -> None:
        self._released_at = self._batches

    def close_step(self) -> None:
        """An optimizer step is done. What has fitted before the first one did so without the optimizer's state."""
        self.shrinks_this_step = 0
        if not self._step_closed:
            self._step_closed = True
            self.bounds = Bounds((), self.bounds.fails)

    def note_remedy(self, remedy: str, failed: Size) -> None:
        """A remedy of the user's has changed what a batch needs: what failed is tried again, twice as much is not."""
        self.remedies.append(remedy)
        self.bounds = Bounds().with_failure(Size(2 * failed.rows, failed.length))
        self.choice = Choice(failed.rows, f"after {remedy}")
        self._observed, self._line = {}, None
        self.shrinks_this_step = 0

    def _is_instructive(self, size: Size) -> bool:
        if len(self._observed) < OBSERVE_ALWAYS or self._batches % OBSERVE_EVERY == 0:
            return True
        return size.tokens > max(self._observed)

    def _observe(self, size: Size) -> None:
        peak = self.meter.peak_bytes() if self.meter is not None else None
        if peak is None:
            return
        self._observed.pop(size.tokens, None)
        self._observed[size.tokens] = peak
        while len(self._observed) > OBSERVATIONS:
            del self._observed[next(iter(self._observed))]
        self._line = fit_line(self._observed.items())

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "limit": self.limit,
            "reason": self.choice.reason,
            "used": sorted(self.used),
            "shrinks": self.shrinks,
            "verified": self.verified,
            "bounds": bounds_to_state(self.bounds),
            "observed": [[tokens, peak] for tokens, peak in self._observed.items()],
            "told_rows": self._told_rows,
            "batches": self._batches,
            "quiet_batches": self._quiet_batches,
            "failed_growths": self._failed_growths,
            "climbing": self._climbing,
            "step_closed": self._step_closed,
            "remedies": list(self.remedies),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Also takes the state of a run whose guard knew a number of rows only."""
        self.used, self.shrinks = set(state["used"]), state["shrinks"]
        self.verified = state["verified"]
        if "bounds" not in state:
            self.limit = state["limit"]
            return
        self.bounds = bounds_from_state(state["bounds"])
        self.choice = Choice(state["limit"], state["reason"])
        self._observed = dict(state["observed"])
        self._line = fit_line(self._observed.items())
        self._told_rows, self._batches = state["told_rows"], state["batches"]
        self._quiet_batches, self._failed_growths = state["quiet_batches"], state["failed_growths"]
        self._climbing, self._step_closed = state["climbing"], state["step_closed"]
        self.remedies = list(state["remedies"])


def _shortage(memory: MemoryFailure | None) -> int | None:
    if memory is None or memory.requested_bytes is None or memory.free_bytes is None:
        return None
    return memory.requested_bytes - memory.free_bytes
