"""How large a micro-batch may be: bounds, the fitted line, and streams of batches under hidden memory laws."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwarden.guards.memory_plan import (
    KEPT,
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
from trainwarden.guards.oom import part_sizes

POLICY = PlanPolicy()
sizes = st.builds(Size, st.integers(1, 64), st.integers(1, 2048))
Law = Callable[[Size], float]
"""Bytes that a micro-batch takes."""


# -- what one size tells about another ---------------------------------------------------------------------------


@st.composite
def laws(draw: st.DrawFn) -> Law:
    """Fixed + per token + attention scores: linear in the rows, at most quadratic in the length."""
    fixed = draw(st.integers(0, 10_000))
    per_token = draw(st.integers(1, 100))
    per_score = draw(st.sampled_from([0.0, 0.0, 0.01, 0.1]))
    return lambda size: fixed + per_token * size.tokens + per_score * size.tokens * size.length


@given(laws(), st.integers(1, 3_000_000), st.lists(sizes, max_size=40), st.integers(1, 2048))
def test_what_is_called_known_to_fit_fits_under_every_law(law: Law, room: int, tried: list[Size], length: int) -> None:
    bounds = Bounds()
    for size in tried:
        bounds = bounds.with_fit(size) if law(size) <= room else bounds.with_failure(size)
    fitting = bounds.fitting_tokens(length)
    assert law(Size(1, length)) <= room or fitting < length
    rows = fitting // length
    assert rows == 0 or law(Size(rows, length)) <= room


@given(st.lists(st.tuples(sizes, st.booleans()), max_size=60), st.integers(1, 2048))
def test_no_history_makes_bounds_contradict_themselves_or_grow_without_end(
    history: list[tuple[Size, bool]], length: int
) -> None:
    bounds = Bounds()
    for size, fits in history:
        bounds = bounds.with_fit(size) if fits else bounds.with_failure(size)
    failing = bounds.failing_tokens(length)
    assert failing is None or failing > bounds.fitting_tokens(length)
    assert len(bounds.fits) <= KEPT
    assert len(bounds.fails) <= KEPT
    assert bounds_from_state(bounds_to_state(bounds)) == bounds


@given(st.lists(st.tuples(sizes, st.booleans()), max_size=30), sizes)
def test_the_newest_evidence_wins(history: list[tuple[Size, bool]], newest: Size) -> None:
    bounds = Bounds()
    for size, fits in history:
        bounds = bounds.with_fit(size) if fits else bounds.with_failure(size)
    assert bounds.with_fit(newest).fitting_tokens(newest.length) >= newest.tokens
    failing = bounds.with_failure(newest).failing_tokens(newest.length)
    assert failing is not None
    assert failing <= newest.tokens


@given(st.lists(sizes, min_size=1, max_size=20), sizes)
def test_knowing_that_more_fits_never_lowers_what_fits(fits: list[Size], more: Size) -> None:
    bounds = Bounds()
    for size in fits:
        bounds = bounds.with_fit(size)
    for length in (1, more.length, 5000):
        assert bounds.with_fit(more).fitting_tokens(length) >= bounds.fitting_tokens(length)


def test_shorter_rows_of_as_many_tokens_fit_and_longer_ones_as_if_attention_were_quadratic() -> None:
    bounds = Bounds().with_fit(Size(8, 100))
    assert bounds.fitting_tokens(10) == 800
    assert bounds.fitting_tokens(100) == 800
    assert bounds.fitting_tokens(200) == 400
    assert bounds.fitting_tokens(1600) == 50, "not one row"


def test_a_failure_counts_for_longer_rows_for_sure_and_for_shorter_ones_until_they_are_seen_to_fit() -> None:
    bounds = Bounds().with_failure(Size(4, 500))
    assert bounds.failing_tokens(500) == bounds.failing_tokens(2000) == bounds.failing_tokens(100) == 2000
    bounds = bounds.with_fit(Size(30, 100))
    assert bounds.failing_tokens(100) == 2000 * 500 // 100, "as if attention were quadratic"
    assert bounds.failing_tokens(500) == 2000


def test_a_size_that_grew_where_it_had_failed_makes_twice_as_much_the_next_frontier() -> None:
    failed = Bounds().with_fit(Size(4)).with_failure(Size(8))
    assert failed.grown_to(Size(8)) == Bounds((Size(8),), (Size(16),))
    assert failed.grown_to(Size(6)) == Bounds((Size(6),), (Size(8),)), "8 has not been contradicted"


# -- the line ----------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 2**33),
    st.integers(1, 2**22),
    st.lists(st.integers(1, 2**17), min_size=2, max_size=24, unique=True),
)
def test_a_linear_law_is_found_from_its_observations(fixed: int, per_token: int, tokens: list[int]) -> None:
    line = fit_line((t, fixed + per_token * t) for t in tokens)
    if max(tokens) < 1.2 * min(tokens):
        assert line is None
        return
    assert line is not None
    top = max(tokens)
    assert line.bytes_at(2 * top) == pytest.approx(fixed + 2 * per_token * top, rel=1e-3)
    assert line.spread_bytes <= 1e-6 * (fixed + per_token * top) + 1


@given(st.floats(0, 1e9), st.floats(1, 1e6), st.floats(0, 1e8), st.floats(0, 1e12))
def test_what_the_line_takes_into_a_room_is_within_it(fixed: float, slope: float, spread: float, room: float) -> None:
    line = MemoryLine(fixed, slope, spread)
    tokens = line.tokens_within(room)
    assert tokens == 0 or line.bytes_at(tokens) + spread <= room * (1 + 1e-9)


@pytest.mark.parametrize(
    "observations",
    [[], [(100, 5)], [(100, 5), (100, 9)], [(100, 5), (110, 9)], [(100, 9), (200, 5)], [(100, 9), (200, 9)]],
    ids=["none", "one", "one size", "too close", "falling", "level"],
)
def test_observations_that_do_not_tell_a_line_give_none(observations: list[tuple[int, int]]) -> None:
    assert fit_line(observations) is None


def test_the_spread_is_the_farthest_observation() -> None:
    line = fit_line([(100, 100), (200, 230), (300, 300)])
    assert line is not None
    assert line.spread_bytes == pytest.approx(20)


# -- one choice --------------------------------------------------------------------------------------------------

LINE = MemoryLine(fixed_bytes=1000, bytes_per_token=10, spread_bytes=0)
BRACKET = Bounds().with_fit(Size(10, 100)).with_failure(Size(40, 100))


def test_while_nothing_has_failed_batches_are_whole() -> None:
    assert choose(POLICY, Knowledge(), Size(64, 4096)) == Choice(None, "nothing has failed")


def test_what_the_line_says_cannot_fit_is_split_before_it_fails() -> None:
    choice = choose(POLICY, Knowledge(line=LINE, room_bytes=21_000), Size(32, 100))
    assert choice.rows == int((21_000 * 0.95 - 1000) / 10 / 100)
    assert "would need" in choice.reason
    assert not choice.growing


def test_what_the_line_says_may_fit_is_left_whole_so_that_a_run_without_a_failure_stays_as_it_was() -> None:
    unsure = MemoryLine(1000, 10, spread_bytes=13_000)
    assert choose(POLICY, Knowledge(line=LINE, room_bytes=33_001), Size(32, 100)).rows is None
    assert choose(POLICY, Knowledge(line=unsure, room_bytes=21_000), Size(32, 100)).rows is None


def test_a_wide_gap_between_what_fits_and_what_fails_is_tried_in_the_middle() -> None:
    choice = choose(POLICY, Knowledge(BRACKET), Size(80, 100))
    assert choice.growing
    assert choice.rows == 20
    assert "between 1000 tokens" in choice.reason


def test_where_a_larger_part_saves_no_pass_nothing_is_tried() -> None:
    bounds = Bounds().with_fit(Size(10, 100)).with_failure(Size(16, 100))
    choice = choose(POLICY, Knowledge(bounds), Size(20, 100))
    assert choice == Choice(10, "1000 tokens are known to fit"), "20 rows are two parts of 10 as of 12"


def test_when_a_failure_could_not_be_recovered_nothing_is_tried() -> None:
    assert choose(POLICY, Knowledge(BRACKET, may_grow=False), Size(80, 100)).rows == 10
    assert choose(POLICY, Knowledge(BRACKET, quiet=True, may_grow=False), Size(80, 100)).rows == 10


def test_a_distance_is_kept_from_what_failed_even_where_more_has_fitted_before() -> None:
    tight = Bounds().with_fit(Size(97, 10)).with_failure(Size(100, 10))
    assert choose(POLICY, Knowledge(tight), Size(95, 10)).rows == 90
    assert choose(POLICY, Knowledge(tight), Size(90, 10)).rows == 90
    assert shrink(POLICY, Knowledge(tight), Size(100, 10)).rows == 90


def test_after_a_quiet_time_what_failed_is_tried_again() -> None:
    close = Bounds().with_fit(Size(10, 100)).with_failure(Size(12, 100))
    assert choose(POLICY, Knowledge(close), Size(60, 100)).rows == 10
    again = choose(POLICY, Knowledge(close, quiet=True), Size(60, 100))
    assert (again.rows, again.growing) == (12, True)
    assert "long ago" in again.reason


def test_but_not_while_the_line_says_that_it_still_does_not_fit() -> None:
    close = Bounds().with_fit(Size(10, 100)).with_failure(Size(12, 100))
    known = Knowledge(close, LINE, room_bytes=12_000, quiet=True)
    assert choose(POLICY, known, Size(60, 100)) == choose(POLICY, Knowledge(close, LINE, 12_000), Size(60, 100))


def test_a_line_that_agrees_with_the_failure_is_trusted_at_once() -> None:
    choice = choose(POLICY, Knowledge(BRACKET, LINE, room_bytes=35_000), Size(80, 100))
    assert choice == Choice(32, "3225 tokens are predicted to fit")


def test_a_line_that_denies_the_failure_is_not_trusted() -> None:
    choice = choose(POLICY, Knowledge(BRACKET, LINE, room_bytes=10**6), Size(80, 100))
    assert (choice.rows, choice.growing) == (20, True)


@given(
    st.lists(st.tuples(sizes, st.booleans()), max_size=30),
    sizes,
    st.none() | st.builds(MemoryLine, st.floats(0, 1e6), st.floats(1, 1e3), st.floats(0, 1e4)),
    st.none() | st.integers(0, 10**8),
    st.booleans(),
)
def test_a_choice_is_at_least_one_row_and_above_a_known_failure_only_where_growth_is_due(
    history: list[tuple[Size, bool]], size: Size, line: MemoryLine | None, room: int | None, quiet: bool
) -> None:
    bounds = Bounds()
    for each, fits in history:
        bounds = bounds.with_fit(each) if fits else bounds.with_failure(each)
    choice = choose(POLICY, Knowledge(bounds, line, room, quiet), size)
    assert choice.reason
    rows = size.rows if choice.rows is None else min(choice.rows, size.rows)
    assert rows >= 1
    failing = bounds.failing_tokens(size.length)
    if failing is not None and rows > 1 and not quiet:
        assert rows * size.length < failing
    far = failing is None or size.tokens <= POLICY.below(failing)
    if far and size.tokens <= bounds.fitting_tokens(size.length):
        assert rows == size.rows, "what is known to fit is not split, unless hardly more has failed"


# -- after a failure ---------------------------------------------------------------------------------------------


def test_with_nothing_known_a_shrink_halves() -> None:
    assert shrink(POLICY, Knowledge(Bounds().with_failure(Size(9))), Size(9)).rows == 5


def test_a_shrink_jumps_to_what_is_known_to_fit() -> None:
    known = Knowledge(Bounds().with_fit(Size(5, 100)).with_failure(Size(64, 100)))
    assert shrink(POLICY, known, Size(64, 100)) == Choice(5, "500 tokens are known to fit")


def test_a_shrink_jumps_to_what_the_line_predicts() -> None:
    known = Knowledge(Bounds().with_fit(Size(5, 100)).with_failure(Size(64, 100)), LINE, room_bytes=40_000)
    assert shrink(POLICY, known, Size(64, 100)) == Choice(37, "3700 tokens are predicted to fit")
    assert shrink(POLICY, known, Size(64, 100), again=True).rows == 5, "the line was wrong once in this step"


def test_a_shrink_goes_down_by_at_least_the_bytes_that_were_missing() -> None:
    known = Knowledge(Bounds().with_failure(Size(64, 100)), LINE)
    choice = shrink(POLICY, known, Size(64, 100), shortage_bytes=20_000)
    assert choice.rows == (6400 - 2000) // 100


@given(
    st.lists(sizes, max_size=10),
    sizes,
    st.none() | st.builds(MemoryLine, st.floats(-1e5, 1e6), st.floats(1, 1e3), st.floats(0, 1e4)),
    st.none() | st.integers(0, 10**8),
    st.none() | st.integers(-(10**7), 10**7),
    st.booleans(),
)
def test_a_shrink_shrinks_whatever_is_known_and_never_below_one_row(
    fits: list[Size], failed: Size, line: MemoryLine | None, room: int | None, shortage: int | None, again: bool
) -> None:
    bounds = Bounds()
    for size in fits:
        bounds = bounds.with_fit(size)
    known = Knowledge(bounds.with_failure(failed), line, room)
    choice = shrink(POLICY, known, failed, shortage_bytes=shortage, again=again)
    assert choice.rows is not None
    assert 1 <= choice.rows <= max(1, failed.rows - 1)
    assert choice.reason


# -- streams of batches ------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A loop that runs batches as the plan says, under a law and a room; no waiting, so that time is batches."""

    law: Law
    room: float
    policy: PlanPolicy = POLICY
    measured: bool = False
    bounds: Bounds = field(default_factory=Bounds)
    observed: dict[int, int] = field(default_factory=dict)
    failures: list[int] = field(default_factory=list)
    shrinks: list[int] = field(default_factory=list)
    parts: int = 0

    def batch(self, size: Size, index: int = 0) -> None:
        choice = choose(self.policy, self._known(), size)
        shrinks, rows_left, limit = 0, size.rows, choice.rows or size.rows
        while rows_left:
            part = Size(max(part_sizes(rows_left, min(limit, rows_left))), size.length)
            self.parts += 1
            if self.law(part) <= self.room:
                self.bounds = self.bounds.with_fit(part)
                self.observed[part.tokens] = int(self.law(part))
                rows_left -= part.rows
                continue
            assert part.rows > 1, "one row fits in every test"
            self.failures.append(index)
            self.bounds = self.bounds.with_failure(part)
            limit = shrink(self.policy, self._known(), part, again=shrinks > 0).rows or 1
            shrinks += 1
        self.shrinks.append(shrinks)

    def _known(self) -> Knowledge:
        line = fit_line(self.observed.items()) if self.measured else None
        return Knowledge(self.bounds, line, int(self.room) if self.measured else None)


@settings(max_examples=150)
@given(
    fixed=st.integers(0, 10_000),
    per_token=st.integers(1, 100),
    capacity=st.integers(512, 20_000),
    batches=st.lists(st.tuples(st.integers(1, 64), st.integers(1, 512)), min_size=1, max_size=120),
)
def test_bounds_alone_converge_in_few_failures_for_any_linear_law(
    fixed: int, per_token: int, capacity: int, batches: list[tuple[int, int]]
) -> None:
    run = Run(lambda size: fixed + per_token * size.tokens, fixed + per_token * capacity)
    for index, batch in enumerate(batches):
        run.batch(Size(*batch), index)
    largest = max(rows * length for rows, length in batches)
    # Halving from the first failure down to what fits, and then one failure for each halving of the gap's logarithm.
    halvings = math.ceil(math.log2(max(2.0, largest / capacity))) + 1
    assert len(run.failures) <= halvings + math.ceil(math.log2(max(2.0, math.log(64, 1.5)))) + 1
    assert max(run.shrinks) <= halvings + 1


@settings(max_examples=100)
@given(
    fixed=st.integers(0, 10_000),
    per_token=st.integers(1, 100),
    capacity=st.integers(2048, 20_000),
    batches=st.lists(st.tuples(st.integers(1, 64), st.integers(1, 512)), min_size=1, max_size=60),
)
def test_with_a_line_no_linear_law_ever_fails(
    fixed: int, per_token: int, capacity: int, batches: list[tuple[int, int]]
) -> None:
    room = (fixed + per_token * capacity) / (1 - POLICY.margin)
    run = Run(lambda size: fixed + per_token * size.tokens, room, measured=True)
    run.batch(Size(1, 256))
    run.batch(Size(2, 256))
    for batch in batches:
        run.batch(Size(*batch))
    assert run.failures == []


def mixed_lengths(count: int, seed: int) -> Iterable[Size]:
    """Batches of 16 rows, padded to the longest of lengths that are spread as those of text are."""
    import random

    draw = random.Random(seed)
    for _ in range(count):
        yield Size(16, max(min(512, int(draw.lognormvariate(4.5, 0.7)) + 8) for _ in range(16)))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("per_score", [0.0, 0.05], ids=["linear", "quadratic"])
@pytest.mark.parametrize("capacity", [600, 1500, 4000], ids=lambda c: f"{c} tokens of 512")
def test_after_the_first_twenty_batches_of_mixed_lengths_at_most_one_fails(
    seed: int, per_score: float, capacity: int
) -> None:
    """The must-hold of the memory plan, without its allocator: 400 batches, before the first growth is due."""

    def law(size: Size) -> float:
        return size.tokens + per_score * size.tokens * size.length

    run = Run(law, law(Size(1, 512)) * capacity / 512)
    for index, size in enumerate(mixed_lengths(400, seed)):
        run.batch(size, index)
    late = [index for index in run.failures if index >= 20]
    assert len(late) <= 1, (run.failures, run.bounds)


def test_waiting_for_growth_doubles_up_to_a_limit() -> None:
    waits = [POLICY.wait_batches(failed) for failed in range(200)]
    assert waits[:3] == [1024, 2048, 4096]
    assert waits == sorted(waits)
    assert waits[-1] == POLICY.max_quiet_batches
