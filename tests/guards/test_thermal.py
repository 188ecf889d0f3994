"""Heat over generated traces: when it warns, pauses, goes on and ends the run; and, above all, when it does not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwarden.device import ClocksEventReasons, Unknown, Unsupported
from trainwarden.errors import InvalidSettingError
from trainwarden.guards.thermal import UNREAD, Heat, ThermalAction, ThermalPolicy, ThermalState
from trainwarden.testing import healthy_reading

POLICY = ThermalPolicy()
SLOWDOWN_OFFSET_C = -2.0


def at(headroom_c: float | None, *, flag: bool | None = False) -> Heat:
    """A device with ``headroom_c``, whose hardware slows down 2 °C above its highest operating temperature."""
    slowdown = None if headroom_c is None else headroom_c - SLOWDOWN_OFFSET_C
    return Heat(headroom_c=headroom_c, slowdown_headroom_c=slowdown, hw_thermal=flag)


def play(
    heats: Iterable[Heat | None], policy: ThermalPolicy = POLICY, *, period_s: float = 1.0
) -> list[tuple[int, ThermalAction]]:
    """(sample, action) for one sample a period; the run ends with the first give_up or abort."""
    state, told = ThermalState(), []
    for index, heat in enumerate(heats):
        state, action = policy.step(state, heat, index * period_s)
        if action is not None:
            told.append((index, action))
        if action in ("give_up", "abort"):
            break
    return told


def headrooms(*values: float | None) -> list[Heat]:
    return [at(value) for value in values]


COOL = [at(30.0)] * 40
HOT = [at(2.0)] * 2

heats = st.builds(
    Heat,
    headroom_c=st.none() | st.integers(-15, 60).map(float),
    slowdown_headroom_c=st.none() | st.integers(-13, 62).map(float),
    hw_thermal=st.sampled_from([None, False, False, True]),
)
traces = st.lists(heats, max_size=120)


class TestAWarning:
    def test_comes_with_the_third_warm_sample_in_a_row_and_once(self) -> None:
        assert play(headrooms(*[10.0] * 50)) == [(2, "warn")]

    def test_is_taken_back_with_the_third_clear_one_and_may_come_again(self) -> None:
        trace = headrooms(*[9.0] * 3, *[15.0] * 3, *[9.0] * 3)
        assert play(trace) == [(2, "warn"), (5, "clear"), (8, "warn")]

    @given(st.lists(st.integers(11, 14), min_size=1, max_size=60), st.booleans())
    def test_does_not_flicker_between_its_two_thresholds(self, between: list[int], warned: bool) -> None:
        start = [10.0] * 3 if warned else [30.0] * 3
        assert [action for _, action in play(headrooms(*start, *map(float, between)))] == ["warn"] * warned

    @given(traces)
    def test_and_its_end_alternate(self, trace: list[Heat]) -> None:
        told = [action for _, action in play(trace) if action in ("warn", "pause", "clear")]
        assert "clear" not in told[:1]
        assert all((one, two) != ("clear", "clear") for one, two in pairwise(told))


class TestAPause:
    def test_begins_with_the_second_hot_sample_in_a_row(self) -> None:
        assert play(headrooms(30.0, 3.0, 3.0)) == [(2, "pause")]

    @given(
        st.lists(st.integers(11, 60), min_size=2, max_size=80),
        st.sets(st.integers(0, 79)),
        st.integers(-40, 3),
    )
    def test_is_never_begun_by_single_spikes(self, cool: list[int], places: set[int], spike: int) -> None:
        trace = [float(value) for value in cool]
        alone = [place for place in sorted(places) if place < len(trace) and place - 1 not in places]
        for place in alone:
            trace[place] = float(spike)
        assert not [action for _, action in play(headrooms(*trace)) if action not in ("warn", "clear")]

    @pytest.mark.parametrize(
        ("flags", "pauses"),
        [("TTT", True), ("TFTFT", True), ("TFFTFT", False), ("TTFFFTT", False), ("T?T?T", True), ("TT???T", False)],
    )
    def test_begins_with_three_thermal_flags_in_five_samples(self, flags: str, pauses: bool) -> None:
        trace = [at(30.0, flag={"T": True, "F": False, "?": None}[each]) for each in flags]
        assert [action for _, action in play(trace)] == ["pause"] * pauses

    def test_ends_by_itself_with_the_third_cool_sample_in_a_row(self) -> None:
        policy = replace(POLICY, min_pause_s=0.0)
        trace = headrooms(2.0, 2.0, 10.0, 20.0, 20.0, 19.0, 20.0, 20.0, 20.0)
        assert play(trace, policy) == [(1, "pause"), (8, "resume")]

    def test_ends_at_the_headroom_that_the_user_wants(self) -> None:
        policy = replace(POLICY, resume_headroom_c=12.0, min_pause_s=0.0)
        assert play(headrooms(2.0, 2.0, *[12.0] * 3), policy) == [(1, "pause"), (4, "resume")]

    def test_lasts_for_a_while_however_soon_it_is_cool(self) -> None:
        assert play([*HOT, *COOL]) == [(1, "pause"), (31, "resume")]

    def test_is_no_reason_to_say_that_the_device_has_cooled_once_more(self) -> None:
        assert play([*HOT, *COOL, *COOL]) == [(1, "pause"), (31, "resume")]

    def test_for_the_flag_ends_only_when_the_flag_is_gone_too(self) -> None:
        flagged = [at(30.0, flag=True)]
        assert play([*flagged * 50, *COOL]) == [(2, "pause"), (52, "resume")]

    def test_of_a_device_without_a_temperature_ends_with_its_flag(self) -> None:
        dark = [at(None, flag=True)] * 50 + [at(None, flag=False)] * 5
        assert [each for each in play(dark) if each[1] != "blind"] == [(2, "pause"), (52, "resume")]

    def test_can_end_between_two_samples(self) -> None:
        state, _ = POLICY.step(ThermalState(), at(2.0), 0.0)
        state, action = POLICY.step(state, at(2.0), 0.0)
        assert action == "pause"
        for _ in range(3):
            state, action = POLICY.step(state, at(30.0), 1.0)
            assert action is None
        assert POLICY.step(state, None, 30.0)[1] == "resume"


class TestAPauseThatDoesNotHelp:
    def test_ends_the_run_after_the_longest_pause_allowed(self) -> None:
        assert play([*HOT, *[at(15.0)] * 300]) == [(1, "pause"), (181, "give_up")]

    def test_ends_it_also_when_no_further_sample_comes(self) -> None:
        assert play([*HOT, *[None] * 300]) == [(1, "pause"), (181, "give_up")]

    @pytest.mark.parametrize("lost", [UNREAD, at(None, flag=False)], ids=["silence", "temperature"])
    def test_ends_it_when_the_sensor_disappears_since_unknown_is_not_cool(self, lost: Heat) -> None:
        assert play([*HOT, *[lost] * 300]) == [(1, "pause"), (181, "give_up")]

    def test_and_a_flag_that_disappears_is_not_a_flag_that_is_gone(self) -> None:
        flagged = [at(30.0, flag=True)] * 3
        assert play([*flagged, *[at(30.0, flag=None)] * 300]) == [(2, "pause"), (182, "give_up")]

    def test_and_a_sensor_that_comes_back_cool_ends_the_pause(self) -> None:
        assert play([*HOT, *[UNREAD] * 100, *COOL]) == [(1, "pause"), (104, "resume")]

    def test_and_a_flag_that_cannot_be_read_does_not_hold_a_pause_that_it_did_not_cause(self) -> None:
        trace = [*HOT, *[at(30.0, flag=None)] * 40]
        assert play(trace) == [(1, "pause"), (31, "resume")]


class TestAnAbort:
    def test_comes_with_the_second_sample_in_a_row_at_the_slowdown_threshold(self) -> None:
        assert play(headrooms(30.0, -2.0, 30.0, -2.0, -2.0)) == [(4, "abort")]

    def test_comes_during_a_pause_too(self) -> None:
        assert play(headrooms(3.0, 3.0, 0.0, -2.0, -3.0)) == [(1, "pause"), (4, "abort")]

    def test_does_not_bridge_a_sample_that_could_not_be_read(self) -> None:
        assert "abort" not in [action for _, action in play(headrooms(-5.0, None, -5.0, None, -5.0))]

    def test_is_never_based_on_a_threshold_that_the_device_does_not_state(self) -> None:
        guessed = Heat(headroom_c=-20.0, slowdown_headroom_c=None, hw_thermal=False)
        assert play([guessed] * 20) == [(1, "pause")]

    @given(traces)
    def test_needs_exactly_two_such_samples(self, trace: list[Heat]) -> None:
        told = play(trace)
        critical = [heat.slowdown_headroom_c is not None and heat.slowdown_headroom_c <= 0 for heat in trace]
        first = next((place for place in range(1, len(trace)) if critical[place - 1] and critical[place]), None)
        assert [place for place, action in told if action == "abort"] == ([] if first is None else [first])


class TestAnUnreadableSample:
    def test_is_told_once_when_it_lasts(self) -> None:
        assert play([*COOL, *[UNREAD] * 50]) == [(len(COOL) + 2, "blind")]

    def test_is_told_again_after_the_sensor_was_back(self) -> None:
        assert [action for _, action in play([*[UNREAD] * 9, at(30.0), *[UNREAD] * 9])] == ["blind", "blind"]

    def test_bridges_a_gap_of_two_on_the_way_to_hot(self) -> None:
        assert play(headrooms(2.0, None, None, 2.0)) == [(3, "pause")]

    def test_forgets_after_a_longer_gap(self) -> None:
        assert play(headrooms(2.0, None, None, None, 2.0)) == [(3, "blind")]

    def test_interrupts_what_leads_to_cool(self) -> None:
        policy = replace(POLICY, min_pause_s=0.0)
        trace = headrooms(2.0, 2.0, 30.0, 30.0, None, 30.0, 30.0, 30.0)
        assert play(trace, policy) == [(1, "pause"), (7, "resume")]

    @given(traces, st.lists(st.integers(0, 120), max_size=10))
    def test_never_ends_a_pause(self, trace: list[Heat], holes: list[int]) -> None:
        for hole in holes:
            trace.insert(min(hole, len(trace)), UNREAD)
        for place, action in play(trace):
            assert action != "resume" or trace[place] != UNREAD


class TestForAnyTrace:
    @given(traces)
    def test_pauses_and_resumptions_alternate(self, trace: list[Heat]) -> None:
        told = [action for _, action in play(trace) if action in ("pause", "resume")]
        assert told == ["pause", "resume"] * (len(told) // 2) + ["pause"] * (len(told) % 2)

    @given(traces, st.sampled_from([0.0, 1.0, 30.0]))
    def test_training_goes_on_only_after_three_samples_of_which_none_is_hot_or_wholly_unknown(
        self, trace: list[Heat], min_pause_s: float
    ) -> None:
        for place, action in play(trace, replace(POLICY, min_pause_s=min_pause_s)):
            if action == "resume":
                for heat in trace[place - 2 : place + 1]:
                    assert heat.hw_thermal is not True
                    assert heat.headroom_c is None or heat.headroom_c >= POLICY.resume_headroom_c
                    assert heat != UNREAD

    @given(traces, st.integers(1, 400))
    def test_no_pause_outlasts_its_limit(self, trace: list[Heat], more: int) -> None:
        told = play([*HOT, *trace, *[UNREAD] * more])
        begins = [place for place, action in told if action == "pause"]
        ends = [place for place, action in told if action in ("resume", "give_up", "abort")]
        total = len(HOT) + len(trace) + more
        last = ends[len(begins) - 1] if len(ends) >= len(begins) else total - 1
        assert last - begins[-1] <= POLICY.max_pause_s

    @given(
        st.integers(-1, 3),
        st.lists(st.integers(-8, 8), min_size=300, max_size=300),
        st.integers(5, 60),
        st.integers(5, 60),
    )
    def test_one_excursion_is_one_pause_whatever_the_noise(
        self, peak: int, noise: list[int], rise: int, fall: int
    ) -> None:
        way_up = [30 - (30 - peak) * place / rise for place in range(rise)]
        way_down = [peak + (32 - peak) * place / fall for place in range(fall)]
        clean = [*way_up, *[float(peak)] * 5, *way_down, *[32.0] * 60]
        # Noise that stays clear of the slowdown threshold, which would end the run instead.
        trace = [at(max(value + jitter, -1.0)) for value, jitter in zip(clean, noise, strict=False)]
        told = [action for _, action in play(trace)]
        assert told.count("pause") <= 1
        assert told.count("resume") == told.count("pause")


def healthy_traces() -> dict[str, Sequence[Heat]]:
    """Ten GPUs at work with which nothing is wrong: spikes, sensor loss, odd thresholds."""
    spiky = [at(-30.0 if place % 4 == 0 else 27.0) for place in range(200)]
    hiccups = [UNREAD if place % 3 == 0 else at(27.0) for place in range(200)]
    flashes = [at(27.0, flag=place % 5 in (0, 1)) for place in range(200)]
    no_slowdown = Heat(headroom_c=25.0, slowdown_headroom_c=None, hw_thermal=False)
    below_zero = Heat(headroom_c=20.0, slowdown_headroom_c=18.0, hw_thermal=False)
    return {
        "steady at 60 °C": [at(27.0)] * 200,
        "a slow climb to 11 °C of headroom": [at(40.0 - 29.0 * place / 199) for place in range(200)],
        "a spike at every fourth sample": spiky,
        "a sensor that misses every third sample": hiccups,
        "a sensor lost for good": [*[at(27.0)] * 50, *[UNREAD] * 150],
        "a spike just before the sensor is lost": [at(27.0), at(-9.0), *[UNREAD] * 100, *[at(27.0)] * 50],
        "a thermal flag that flashes twice in five": flashes,
        "a device that states no slowdown threshold": [no_slowdown] * 200,
        "thresholds in an odd order": [below_zero] * 200,
        "a saw tooth between 11 and 25 °C": [at(11.0 + place % 15) for place in range(200)],
    }


@pytest.mark.parametrize("name", healthy_traces())
def test_a_healthy_device_raises_no_alarm(name: str) -> None:
    allowed = {"blind"} if "lost" in name else set()
    assert {action for _, action in play(healthy_traces()[name])} <= allowed


def test_two_spikes_around_an_unreadable_sample_are_not_a_healthy_trace() -> None:
    assert play(headrooms(27.0, 1.0, None, 1.0)) == [(3, "pause")]


class TestWhatIsReadOfADevice:
    def test_is_its_headroom_and_its_hardware_thermal_flag(self) -> None:
        reading = healthy_reading(clocks_event_reasons=ClocksEventReasons.decode(0x48))
        assert Heat.of(reading) == Heat(headroom_c=27.0, slowdown_headroom_c=29.0, hw_thermal=True)

    def test_is_not_the_software_limit_that_works_as_designed(self) -> None:
        reading = healthy_reading(clocks_event_reasons=ClocksEventReasons.decode(0x28))
        assert Heat.of(reading).hw_thermal is False

    def test_is_none_where_it_is_unsupported_or_unknown(self) -> None:
        reading = healthy_reading(
            headroom_c=Unknown("x"), slowdown_headroom_c=Unsupported("x"), clocks_event_reasons=Unsupported("x")
        )
        assert Heat.of(reading) == UNREAD

    def test_is_not_its_memory_so_that_a_full_cache_never_looks_like_heat(self) -> None:
        full = healthy_reading(memory_used_bytes=80 * 2**30)
        assert Heat.of(full) == Heat.of(healthy_reading())


@pytest.mark.parametrize(
    "wrong",
    [
        {"warn_headroom_c": 16.0},
        {"pause_headroom_c": 11.0},
        {"resume_headroom_c": 3.0},
        {"warn_samples": 0},
        {"flag_window": 0},
        {"max_pause_s": 10.0},
        {"min_pause_s": -1.0},
    ],
)
def test_a_policy_that_contradicts_itself_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidSettingError, match="thermal"):
        replace(POLICY, **wrong)  # type: ignore[arg-type]
