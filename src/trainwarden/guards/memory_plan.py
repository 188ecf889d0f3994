"""How large a micro-batch may be: what has fitted, what has failed, a fitted line of bytes, and what to try next.

Two sources of knowledge. `Bounds` need no statistics: a micro-batch that ran through, and one that did not, bound every
other one. `MemoryLine` comes from an allocator that tells its peaks: bytes = fixed + per token × tokens. Both count
*tokens*, padding included: rows × length; for data without a length a token is a row.

What one size tells about another (activations of a network are linear in the tokens, attention scores at most
quadratic in the length): at the same number of tokens, shorter rows need no more memory; and in longer rows, the same
rows × length² need no more. The first is true of all losses that are computed row by row, the second wherever nothing
grows faster than attention scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

KEPT = 16
"""Sizes of each kind that are remembered. Those that tell nothing new are not, so a few are enough."""


class Size(NamedTuple):
    """A (micro-)batch: its rows, and the elements of its input in each of them, padding included."""

    rows: int
    length: int = 1

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def __str__(self) -> str:
        return f"{self.rows} rows" if self.length == 1 else f"{self.rows} rows of {self.length}"


@dataclass(frozen=True, slots=True)
class Bounds:
    """The largest sizes known to fit and the smallest known to fail. The newest evidence wins."""

    fits: tuple[Size, ...] = ()
    fails: tuple[Size, ...] = ()

    def fitting_tokens(self, length: int) -> int:
        """The most tokens that are known to fit in rows of ``length``; 0 when nothing is known."""
        return max((_fitting(fit, length) for fit in self.fits), default=0)

    def failing_tokens(self, length: int) -> int | None:
        """The fewest tokens in rows of ``length`` that are known or likely to fail: more than are known to fit.

        A failure of shorter rows is certain. One of longer rows is taken at its tokens (nothing quadratic), and where
        those are known to fit, at its rows × length².
        """
        fitting = self.fitting_tokens(length)
        found = []
        for fail in self.fails:
            tokens = fail.tokens
            if fail.length > length and tokens <= fitting:
                tokens = tokens * fail.length // length
            if tokens > fitting:
                found.append(tokens)
        return min(found, default=None)

    def with_fit(self, size: Size) -> Bounds:
        """``size`` ran through."""
        if size.tokens <= self.fitting_tokens(size.length):
            return self
        fits = [fit for fit in self.fits if fit.tokens > _fitting(size, fit.length)]
        fails = tuple(fail for fail in self.fails if fail.tokens > _fitting(size, fail.length))
        return Bounds((*fits, size)[-KEPT:], fails)

    def with_failure(self, size: Size) -> Bounds:
        """``size`` ran out of memory."""
        fits = tuple(fit for fit in self.fits if size.tokens > _fitting(fit, size.length))
        fails = [fail for fail in self.fails if not _implies(size, fail)]
        if not any(_implies(fail, size) for fail in fails):
            fails.append(size)
        return Bounds(fits, tuple(fails[-KEPT:]))

    def with_lessons(self, lessons: Sequence[tuple[Size, Size]]) -> Bounds:
        """What several like devices have learned at once: each a size that failed, and the one that was run instead.

        What failed on one is believed to fail on all, whatever ran on another.
        """
        bounds = self
        for failed, _ in lessons:
            bounds = bounds.with_failure(failed)
        for _, fits in lessons:
            if all(failed.tokens > _fitting(fits, failed.length) for failed, _ in lessons):
                bounds = bounds.with_fit(fits)
        return bounds

    def grown_to(self, size: Size) -> Bounds:
        """``size`` ran through although it was believed to fail. Twice as much is believed to fail from now on."""
        bounds = self.with_fit(size)
        return bounds if len(bounds.fails) == len(self.fails) else bounds.with_failure(Size(2 * size.rows, size.length))


def _fitting(fit: Size, length: int) -> int:
    """The tokens in rows of ``length`` that fit because ``fit`` does."""
    return fit.tokens if fit.length >= length else fit.tokens * fit.length // length


def _implies(fail: Size, other: Size) -> bool:
    """Whether ``other`` fails because ``fail`` does."""
    return fail.length <= other.length and fail.tokens <= other.tokens


# -- bytes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MemoryLine:
    """Bytes that a forward and backward pass takes at its peak, beyond what is there before it.

    ``spread_bytes``: how far the observations lie from the line at most.
    """

    fixed_bytes: float
    bytes_per_token: float
    spread_bytes: float

    def bytes_at(self, tokens: int) -> float:
        return self.fixed_bytes + self.bytes_per_token * tokens

    def tokens_within(self, room_bytes: float) -> int:
        """The most tokens whose peak, and the spread on top of it, is within ``room_bytes``."""
        return max(0, int((room_bytes - self.spread_bytes - self.fixed_bytes) / self.bytes_per_token))


MIN_SPAN = 1.2
"""Ratio of the largest to the smallest observation below which a line is mostly rounding."""


def fit_line(observations: Iterable[tuple[int, int]]) -> MemoryLine | None:
    """The line of least squares through pairs of tokens and bytes; ``None`` where they do not tell one."""
    pairs = list(observations)
    if len(pairs) < 2 or max(t for t, _ in pairs) < MIN_SPAN * min(t for t, _ in pairs):
        return None
    mean_tokens = math.fsum(t for t, _ in pairs) / len(pairs)
    mean_bytes = math.fsum(b for _, b in pairs) / len(pairs)
    variance = math.fsum((t - mean_tokens) ** 2 for t, _ in pairs)
    slope = math.fsum((t - mean_tokens) * (b - mean_bytes) for t, b in pairs) / variance
    if slope <= 0:
        return None
    fixed = mean_bytes - slope * mean_tokens
    return MemoryLine(fixed, slope, max(abs(b - fixed - slope * t) for t, b in pairs))


# -- what to try ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanPolicy:
    """When a larger micro-batch is tried again than is known to fit."""

    refine_ratio: float = 1.5
    """Tokens that fail over tokens that fit: above it the gap is worth one more failure, and is tried at once."""
    quiet_batches: int = 1024
    """Batches without a failure before a size that failed is tried again; doubled each time that it fails again."""
    max_quiet_batches: int = 2**16
    growing_batches: int = 16
    """Batches between two growths while growing succeeds."""
    margin: float = 0.05
    """Of the free memory, left free when a size is taken from the line: fragments, and what the line does not see."""
    distance: float = 0.1
    """Kept below the tokens that failed: allocators do not fail at exactly the same size each time (5 % measured)."""

    def below(self, failing_tokens: int) -> int:
        """The most tokens that are far enough from those that failed."""
        return int(failing_tokens * (1 - self.distance))

    def wait_batches(self, failed_growths: int) -> int:
        """Batches to wait after that many growths in a row have failed."""
        return min(self.quiet_batches << min(failed_growths, 32), self.max_quiet_batches)


@dataclass(frozen=True, slots=True)
class Knowledge:
    """All that a choice depends on besides the batch. ``room_bytes``: what may be allocated beyond what is in use."""

    bounds: Bounds = Bounds()
    line: MemoryLine | None = None
    room_bytes: int | None = None
    quiet: bool = False
    """Whether it has been quiet for long enough to try what failed."""
    may_grow: bool = True
    """Whether a failure could still be recovered in this step."""


@dataclass(frozen=True, slots=True)
class Choice:
    """``rows`` of the largest micro-batch, ``None`` for whole batches; ``growing``: it may well not fit."""

    rows: int | None
    reason: str
    growing: bool = False


def choose(policy: PlanPolicy, known: Knowledge, size: Size) -> Choice:
    """In what parts a batch of ``size`` is run, decided before its first attempt.

    Nothing known to fail: whole, unless the line says for certain (its spread taken off) that it cannot fit.
    """
    fitting = known.bounds.fitting_tokens(size.length)
    failing = known.bounds.failing_tokens(size.length)
    if failing is None:
        return _choose_by_line(policy, known, size, fitting)
    fitting = min(fitting, policy.below(failing))
    if size.tokens <= fitting:
        return Choice(fitting // size.length, f"{fitting} tokens are known to fit")
    steady = _steady(policy, known, size, fitting, failing)
    parts = _parts(size.rows, steady.rows)
    if parts == 1 or not known.may_grow:
        return steady
    larger = _regrown(policy, known, size, failing, parts) or _refined(policy, known, size, fitting, failing)
    if larger is None or _parts(size.rows, larger.rows) >= parts:
        return steady
    return replace(larger, rows=-(-size.rows // _parts(size.rows, larger.rows)))


def _choose_by_line(policy: PlanPolicy, known: Knowledge, size: Size, fitting: int) -> Choice:
    line, room = known.line, known.room_bytes
    if line is None or room is None or size.tokens <= fitting:
        return Choice(None, "nothing has failed")
    least = line.bytes_at(size.tokens) - line.spread_bytes
    if least <= room:
        return Choice(None, "nothing has failed, and it is predicted to fit")
    tokens = max(line.tokens_within(room * (1 - policy.margin)), fitting)
    rows = max(1, min(tokens // size.length, size.rows - 1))
    return Choice(rows, f"{size} would need {_gib(least)}, and {_gib(room)} are free")


def _steady(policy: PlanPolicy, known: Knowledge, size: Size, fitting: int, failing: int) -> Choice:
    """A size that should fit: from the line where it agrees with the failure, else the largest known to fit."""
    predicted = _predicted(policy, known)
    if predicted is not None and fitting < predicted < failing and predicted >= size.length:
        return Choice(predicted // size.length, f"{predicted} tokens are predicted to fit")
    if fitting >= size.length:
        return Choice(fitting // size.length, f"{fitting} tokens are known to fit")
    return Choice(max(1, failing // 2 // size.length), f"half of {failing} tokens, which did not fit")


def _regrown(policy: PlanPolicy, known: Knowledge, size: Size, failing: int, parts: int) -> Choice | None:
    """After a quiet time what failed, or as much more as saves one pass; ``None`` where that is not due."""
    rows = max(failing // size.length, -(-size.rows // (parts - 1)))
    predicted = _predicted(policy, known)
    if not known.quiet or (predicted is not None and predicted < rows * size.length):
        return None
    return Choice(rows, f"{failing} tokens did not fit long ago", growing=True)


def _refined(policy: PlanPolicy, known: Knowledge, size: Size, fitting: int, failing: int) -> Choice | None:
    """The middle between what fits and what fails where they are far apart and no line tells."""
    predicted = _predicted(policy, known)
    told = predicted is not None and predicted < failing
    if told or fitting < size.length or failing <= policy.refine_ratio * fitting:
        return None
    middle = math.isqrt(fitting * failing)
    return Choice(middle // size.length, f"between {fitting} tokens, known to fit, and {failing}", growing=True)


def _predicted(policy: PlanPolicy, known: Knowledge) -> int | None:
    if known.line is None or known.room_bytes is None:
        return None
    return known.line.tokens_within(known.room_bytes * (1 - policy.margin))


def shrink(
    policy: PlanPolicy, known: Knowledge, failed: Size, *, shortage_bytes: int | None = None, again: bool = False
) -> Choice:
    """The size to retry with after ``failed`` (already part of ``known.bounds``) ran out of memory; always smaller.

    The size that the line and the bytes missing (``shortage_bytes``: requested and not free) say will fit; without
    them, or ``again`` in the same step, the largest known to fit; where none is, half.
    """
    most = max(1, failed.rows - 1)
    fitting = min(known.bounds.fitting_tokens(failed.length), policy.below(failed.tokens))
    predicted = None if again else _predicted_after(policy, known, failed, shortage_bytes)
    if predicted is not None and predicted >= max(fitting, failed.length):
        return Choice(min(most, predicted // failed.length), f"{predicted} tokens are predicted to fit")
    if fitting >= failed.length:
        return Choice(min(most, fitting // failed.length), f"{fitting} tokens are known to fit")
    return Choice(min(most, -(-failed.rows // 2)), "half of what did not fit")


def _predicted_after(policy: PlanPolicy, known: Knowledge, failed: Size, shortage_bytes: int | None) -> int | None:
    found = []
    predicted = _predicted(policy, known)
    if predicted is not None and predicted < failed.tokens:
        found.append(predicted)
    if known.line is not None and shortage_bytes is not None and shortage_bytes > 0:
        found.append(failed.tokens - math.ceil(shortage_bytes / known.line.bytes_per_token))
    return min(found, default=None)


def _parts(rows: int, limit: int | None) -> int:
    return 1 if limit is None else -(-rows // max(1, limit))


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"


def bounds_to_state(bounds: Bounds) -> dict[str, Any]:
    """JSON-serialisable."""
    return {"fits": [list(size) for size in bounds.fits], "fails": [list(size) for size in bounds.fails]}


def bounds_from_state(state: Mapping[str, Any]) -> Bounds:
    return Bounds(tuple(Size(*size) for size in state["fits"]), tuple(Size(*size) for size in state["fails"]))
