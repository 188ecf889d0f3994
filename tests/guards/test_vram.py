"""Device memory over generated traces: what counts as pressure, and what is done about it in which order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwarden.device import AllocatorMemory, GpuProcess, Unknown, Unsupported
from trainwarden.errors import InvalidSettingError
from trainwarden.guards.vram import Usage, VramAction, VramPolicy, VramState, alone, largest_foreign
from trainwarden.testing import healthy_reading

GIB = 2**30
TOTAL = 80 * GIB
POLICY = VramPolicy()
CONTEXT_GIB = 1.5
OWN_PID = 100


def usage(own_gib: float, foreign_gib: float = CONTEXT_GIB) -> Usage:
    """Our allocator holds ``own_gib``; others, contexts and the driver ``foreign_gib``; at most all there is."""
    used = min(int((own_gib + foreign_gib) * GIB), TOTAL)
    return Usage(used_bytes=used, total_bytes=TOTAL, reserved_bytes=int(own_gib * GIB))


def play(trace: Iterable[Usage | None], policy: VramPolicy = POLICY) -> list[tuple[int, VramAction]]:
    state, done = VramState(), []
    for index, each in enumerate(trace):
        state, action = policy.step(state, each)
        if action is not None:
            done.append((index, action))
    return done


ALONE = [usage(40)] * 5
INTRUDER = [usage(40, 38)]
usages = st.builds(usage, st.integers(0, 80).map(float), st.integers(0, 80).map(float))


class TestOurOwnMemory:
    @given(st.lists(st.floats(0, 78.5), max_size=120))
    def test_alone_is_never_pressure_however_full_and_however_it_jumps(self, own_gib: list[float]) -> None:
        assert play(map(usage, own_gib)) == []

    @given(st.lists(st.tuples(st.integers(1, 76), st.integers(0, 76)), min_size=1, max_size=120))
    def test_read_at_another_moment_than_the_device_is_never_pressure(self, trace: list[tuple[int, int]]) -> None:
        """The device's figure is up to a second older than the allocator's, so that their difference lies."""
        seen = [
            Usage(
                used_bytes=int((then + CONTEXT_GIB) * GIB),
                total_bytes=TOTAL,
                reserved_bytes=now * GIB + place % 2 * GIB,
            )
            for place, (now, then) in enumerate(trace)
        ]
        assert play(seen) == []

    def test_and_a_context_with_communication_buffers_is_never_pressure(self) -> None:
        assert play([*[usage(70)] * 5, *[usage(75, CONTEXT_GIB + 3.5)] * 50]) == []


class TestMemoryThatOthersTook:
    def test_makes_us_return_our_cache_first_and_then_shrink_and_no_more_than_twice(self) -> None:
        assert play([*ALONE, *INTRUDER * 60]) == [(7, "release_cache"), (10, "shrink"), (13, "shrink")]

    def test_is_no_matter_while_there_is_room(self) -> None:
        assert play([*ALONE, *[usage(40, 35)] * 60]) == []

    def test_before_the_run_began_is_no_matter_either(self) -> None:
        assert play([usage(40, 38)] * 60) == []

    def test_is_pressure_also_when_it_is_added_to_what_others_had_before(self) -> None:
        assert play([*[usage(40, 20)] * 5, *[usage(40, 37)] * 3])[0] == (7, "release_cache")

    def test_needs_three_samples_in_a_row(self) -> None:
        flashes = [*INTRUDER * 2, usage(40, 30)] * 20
        assert play([*ALONE, *flashes]) == []

    def test_does_not_count_while_our_own_share_moves(self) -> None:
        moving = [usage(40 - place % 2 * 2, 38 + place % 2 * 2) for place in range(60)]
        assert play([*ALONE, *moving]) == []

    def test_is_no_pressure_any_more_once_the_cache_was_enough(self) -> None:
        assert play([*ALONE, *INTRUDER * 3, *[usage(20, 38)] * 60]) == [(7, "release_cache")]

    def test_that_goes_and_comes_back_starts_over(self) -> None:
        trace = [*ALONE, *INTRUDER * 3, *ALONE, *INTRUDER * 3]
        assert [action for _, action in play(trace)] == ["release_cache", "release_cache"]

    def test_is_one_time_of_pressure_as_long_as_the_device_is_not_relieved(self) -> None:
        between = [usage(40, 34)] * 10
        trace = [*ALONE, *INTRUDER * 3, *between, *INTRUDER * 3, *between, *INTRUDER * 3]
        assert [action for _, action in play(trace)] == ["release_cache", "shrink", "shrink"]

    def test_counts_on_after_a_sample_that_could_not_be_read(self) -> None:
        assert play([*ALONE, *INTRUDER * 2, None, *INTRUDER])[0] == (8, "release_cache")


class TestForAnyTrace:
    @given(st.lists(st.none() | usages, max_size=150))
    def test_something_is_done_only_on_a_full_device_with_grown_foreign_memory(self, trace: list[Usage | None]) -> None:
        for place, _ in play(trace):
            seen = trace[place]
            assert seen is not None
            assert seen.used_bytes >= POLICY.full_fraction * TOTAL
            least = min(each.foreign_bytes for each in trace[: place + 1] if each is not None)
            assert seen.foreign_bytes - least >= POLICY.growth_fraction * TOTAL

    @given(st.lists(usages.flatmap(lambda each: st.just([each] * 4)), max_size=40))
    def test_no_shrink_comes_before_the_cache_was_returned_and_no_more_than_two_after_it(
        self, blocks: list[list[Usage]]
    ) -> None:
        word = "".join(action[0] for _, action in play([each for block in blocks for each in block]))
        assert all(len(shrinks) <= POLICY.max_shrinks for shrinks in word.split("r"))
        assert not word.startswith("s")


class TestTheNamedProcess:
    def test_is_the_largest_that_is_not_ours(self) -> None:
        processes = [GpuProcess(OWN_PID, 50 * GIB), GpuProcess(7, 2 * GIB), GpuProcess(8, 20 * GIB)]
        assert largest_foreign(processes, OWN_PID) == GpuProcess(8, 20 * GIB)

    def test_is_named_also_when_its_memory_is_not_told(self) -> None:
        processes = [GpuProcess(OWN_PID, Unsupported("x")), GpuProcess(7, Unsupported("x"))]
        assert largest_foreign(processes, OWN_PID) == GpuProcess(7, Unsupported("x"))

    def test_is_none_in_a_container_where_any_of_them_may_be_ours(self) -> None:
        assert largest_foreign([GpuProcess(7, 20 * GIB)], OWN_PID) is None

    def test_is_none_when_the_driver_does_not_say(self) -> None:
        assert largest_foreign(Unknown("x"), OWN_PID) is None
        assert largest_foreign([GpuProcess(OWN_PID, GIB)], OWN_PID) is None

    def test_is_certainly_absent_only_when_we_are_the_whole_list(self) -> None:
        assert alone([GpuProcess(OWN_PID, GIB)], OWN_PID)
        assert not alone([], OWN_PID)
        assert not alone([GpuProcess(7, GIB)], OWN_PID)
        assert not alone(Unknown("x"), OWN_PID)


class TestWhatIsReadOfADevice:
    ALLOCATOR = AllocatorMemory(
        allocated_bytes=10 * GIB, reserved_bytes=30 * GIB, peak_allocated_bytes=0, peak_reserved_bytes=0
    )

    def test_is_its_memory_beside_our_reserve_so_that_cached_memory_counts_as_ours(self) -> None:
        seen = Usage.of(healthy_reading(), self.ALLOCATOR)
        assert seen == Usage(used_bytes=40 * GIB, total_bytes=80 * GIB, reserved_bytes=30 * GIB)
        assert seen.foreign_bytes == 10 * GIB

    @pytest.mark.parametrize(
        "reading",
        [
            healthy_reading(memory_used_bytes=Unknown("x")),
            healthy_reading(memory_total_bytes=Unsupported("x")),
            healthy_reading(memory_source="host"),
        ],
        ids=["used", "total", "unified memory"],
    )
    def test_is_nothing_where_the_device_does_not_tell(self, reading: object) -> None:
        assert Usage.of(reading, self.ALLOCATOR) is None  # type: ignore[arg-type]

    def test_is_nothing_while_torch_has_not_used_the_device(self) -> None:
        assert Usage.of(healthy_reading(), Unknown("CUDA is not initialised in this process")) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"full_fraction": 0.9},
        {"full_fraction": 1.1},
        {"relieved_fraction": 0.0},
        {"growth_fraction": 0.0},
        {"samples": 0},
        {"max_shrinks": -1},
    ],
)
def test_a_policy_that_contradicts_itself_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidSettingError, match="vram"):
        replace(POLICY, **wrong)  # type: ignore[arg-type]
