"""The guards together over samples: decisions, their order, and what a run is told."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.waiting import until
from trainwarden.device import (
    AllocatorMemory,
    ClocksEventReasons,
    GpuProcess,
    Reading,
    RecoveryAction,
    RemappedRows,
    Sample,
    Sampler,
    SensorSilent,
    Unknown,
    Unsupported,
    Value,
    Xid,
    allocator_memory,
    known,
    unreadable,
)
from trainwarden.errors import GPUError, GPUMonitoringError, GPUTemperatureError, WardenError
from trainwarden.events import to_dict
from trainwarden.guards.decisions import Abort, Decision, Pause, ReleaseCache, Resume, Shrink, Warn
from trainwarden.guards.hardware import HardwareGuard, HardwarePolicies
from trainwarden.guards.sight import SightPolicy
from trainwarden.guards.thermal import ThermalPolicy
from trainwarden.testing import FakeDevice, FakeSource, healthy_reading

GIB = 2**30
OWN_PID = 100
FLAG = ClocksEventReasons.decode(0x40)
MISSING = Unknown("the sensor does not answer")
SILENCE = SensorSilent(6.1, "nvmlDeviceGetPowerUsage", Sample(taken_at_s=0.0))


def hot(headroom_c: float, index: int = 0, **more: Any) -> Reading:
    """A device with ``headroom_c`` below a limit of 87 °C; its hardware slows down at 89 °C."""
    return healthy_reading(
        index, temperature_c=87.0 - headroom_c, headroom_c=headroom_c, slowdown_headroom_c=headroom_c + 2, **more
    )


def dark(index: int = 0) -> Reading:
    return unreadable(index, f"GPU-fake-{index}", "Fake GPU", MISSING, 0.0)


def reserved(own_gib: float) -> AllocatorMemory:
    own = int(own_gib * GIB)
    return AllocatorMemory(
        allocated_bytes=own // 2, reserved_bytes=own, peak_allocated_bytes=own, peak_reserved_bytes=own
    )


class Bench:
    """A guard, a clock, and the sampler's counter: one sample a second."""

    def __init__(self, policies: HardwarePolicies | None = None, **options: Any) -> None:
        self.now_s = 100.0
        self.sequence = 0
        self.memory: Value[AllocatorMemory] = reserved(30)
        self.processes: Value[tuple[GpuProcess, ...]] = Unknown("not asked")
        self.asked = 0
        given: dict[str, Any] = {"allocator": lambda _: self.memory, "processes": self._processes, "own_pid": OWN_PID}
        self.guard = HardwareGuard(policies, lambda: self.now_s, **{**given, **options})

    def _processes(self, reading: Reading) -> Value[tuple[GpuProcess, ...]]:
        self.asked += 1
        return self.processes

    def sample(self, *readings: Reading, xids: Sequence[Xid] = (), reason: str = "", **more: Any) -> Sample:
        self.sequence += 1
        return Sample(
            readings=readings,
            reason=reason,
            taken_at_s=self.now_s,
            sequence=self.sequence,
            xids=tuple(xids),
            **more,
        )

    def show(self, *readings: Reading, **more: Any) -> list[Decision]:
        """What one further sample leads to, at the next step boundary."""
        self.now_s += 1.0
        return self.guard.observe(self.sample(*readings, **more), step=7)

    def sample_again(self, *readings: Reading) -> Sample:
        """The newest sample as it was, not one more."""
        return Sample(readings=readings, taken_at_s=self.now_s, sequence=self.sequence)

    def again(self, latest: Sample | SensorSilent, after_s: float = 1.0) -> list[Decision]:
        self.now_s += after_s
        return self.guard.observe(latest, step=7)


def abort_of(decisions: Sequence[Decision]) -> Abort:
    """The abort at the end of ``decisions``, before which nothing but news stands."""
    *news, end = decisions
    assert all(isinstance(each, Warn) for each in news)
    assert isinstance(end, Abort)
    return end


def error_of(decisions: Sequence[Decision]) -> WardenError:
    return abort_of(decisions).error


def texts(decisions: Sequence[Decision]) -> list[str]:
    return [str(each.event) for each in decisions if not isinstance(each, Abort)]


class TestHeat:
    def test_is_warned_of_paused_for_and_recovered_from(self) -> None:
        bench = Bench()
        warned = [bench.show(hot(9.0)) for _ in range(3)][-1]
        assert texts(warned) == ["GPU 0 is getting hot after step 7: 78 °C, 9 °C below its limit"]
        bench.show(hot(2.0))
        (pause,) = bench.show(hot(1.0))
        assert isinstance(pause, Pause)
        assert bench.guard.paused
        assert str(pause.event) == (
            "training pauses after step 7: GPU 0 is too hot (86 °C, 1 °C below its limit); "
            "it continues once 20 °C of headroom are back"
        )
        cooling = [decision for _ in range(30) for decision in bench.show(hot(25.0))]
        (resume,) = cooling
        assert isinstance(resume, Resume)
        assert not bench.guard.paused
        assert str(resume.event) == "training continues after step 7: GPU 0 has cooled at 62 °C (30 s)"
        assert [bench.show(hot(25.0)) for _ in range(60)] == [[]] * 60

    def test_that_has_passed_is_told_too(self) -> None:
        bench = Bench()
        told = [text for c in (9.0, 16.0) for _ in range(3) for text in texts(bench.show(hot(c)))]
        assert told[1:] == ["GPU 0 has cooled: 71 °C, 16 °C below its limit"]

    def test_that_stays_ends_the_run_after_a_checkpoint_to_be_tried_again_after_a_cool_down(self) -> None:
        bench = Bench()
        decisions: list[Decision] = []
        while not any(isinstance(each, Abort) for each in decisions):
            decisions = bench.show(hot(3.0))
        end = abort_of(decisions)
        assert isinstance(end.error, GPUTemperatureError)
        assert end.save_first
        assert end.error.retry == "after_cooldown"
        assert end.error.message == "GPU 0 is too hot: 84 °C, 3 °C below its limit, after a pause of 180 s"
        assert end.error.details["paused_s"] == 180.0

    def test_at_the_slowdown_threshold_ends_the_run_after_a_checkpoint(self) -> None:
        bench = Bench()
        bench.show(hot(-2.0))
        end = abort_of(bench.show(hot(-3.0)))
        assert end.error.code == "RUNTIME_GPU_TEMPERATURE_CRITICAL"
        assert end.save_first
        assert end.error.message == "GPU 0 is too hot: 90 °C, 3 °C above its limit, at its slowdown threshold"

    def test_is_counted_in_samples_and_not_in_steps(self) -> None:
        bench = Bench()
        latest = bench.sample(hot(1.0))
        assert [bench.again(latest, 0.01) for _ in range(50)] == [[]] * 50

    def test_of_any_device_pauses_and_only_all_of_them_cool_end_the_pause(self) -> None:
        bench = Bench(HardwarePolicies(thermal=ThermalPolicy(min_pause_s=0.0)))
        bench.show(hot(2.0, 0), hot(30.0, 1))
        (pause,) = bench.show(hot(2.0, 0), hot(30.0, 1))
        assert isinstance(pause, Pause)
        bench.show(hot(30.0, 0), hot(1.0, 1))
        (second,) = bench.show(hot(30.0, 0), hot(1.0, 1))
        assert isinstance(second, Warn)
        assert [bench.show(hot(30.0, 0), hot(1.0, 1)) for _ in range(9)] == [[]] * 9
        *nothing, last = [bench.show(hot(30.0, 0), hot(30.0, 1)) for _ in range(3)]
        assert nothing == [[], []]
        assert isinstance(last[0], Resume)
        assert last[0].event.paused_s == 14.0

    def test_of_one_device_that_begins_as_that_of_another_ends_does_not_interrupt_the_pause(self) -> None:
        bench = Bench(HardwarePolicies(thermal=ThermalPolicy(min_pause_s=0.0)))
        for _ in range(2):
            bench.show(hot(2.0, 0), hot(30.0, 1))
        bench.show(hot(30.0, 0), hot(30.0, 1))
        bench.show(hot(30.0, 0), hot(2.0, 1))
        (told,) = bench.show(hot(30.0, 0), hot(2.0, 1))
        assert isinstance(told, Warn)
        assert bench.guard.paused

    def test_of_a_device_that_the_run_does_not_use_is_no_concern_of_it(self) -> None:
        bench = Bench(devices={1})
        assert [bench.show(hot(-9.0, 0), hot(27.0, 1)) for _ in range(20)] == [[]] * 20

    def test_that_only_the_thermal_flag_shows_says_so(self) -> None:
        bench = Bench()
        for _ in range(2):
            bench.show(hot(30.0, clocks_event_reasons=FLAG))
        (pause,) = bench.show(hot(30.0, clocks_event_reasons=FLAG))
        assert "57 °C, 30 °C below its limit, slowed down by its hardware for heat" in texts([pause])[0]

    def test_by_an_assumed_limit_says_that_it_is_assumed(self) -> None:
        bench = Bench()
        assumed = hot(9.0, headroom_source="assumed", headroom_note="…")
        told = [text for _ in range(3) for text in texts(bench.show(assumed))]
        assert told[0].endswith("9 °C below its limit, a limit that is assumed since the device states none")

    def test_is_not_judged_when_the_policy_is_off(self) -> None:
        bench = Bench(HardwarePolicies(thermal=None))
        assert [bench.show(hot(-9.0)) for _ in range(20)] == [[]] * 20

    def test_is_not_a_full_cache(self) -> None:
        bench = Bench()
        bench.memory = reserved(78)
        assert [bench.show(hot(30.0, memory_used_bytes=80 * GIB)) for _ in range(50)] == [[]] * 50

    @pytest.mark.parametrize("lost", ["silence", "device", "temperature"])
    def test_whose_sensor_disappears_during_the_pause_neither_resumes_nor_hangs(self, lost: str) -> None:
        bench = Bench()
        for _ in range(2):
            bench.show(hot(1.0))
        assert bench.guard.paused
        cold = healthy_reading(temperature_c=MISSING, headroom_c=MISSING, slowdown_headroom_c=MISSING)
        blind = cold if lost == "temperature" else dark()
        for _ in range(179):
            decisions = bench.again(SILENCE) if lost == "silence" else bench.show(blind)
            assert all(isinstance(each, Warn) for each in decisions)
        end = error_of(bench.again(SILENCE) if lost == "silence" else bench.show(blind))
        assert isinstance(end, GPUTemperatureError)
        assert end.details["temperature_c"] is None
        assert end.message.endswith("after a pause of 180 s")


class TestMemory:
    def test_taken_by_another_process_is_named_and_first_costs_only_the_cache(self) -> None:
        bench = Bench()
        for _ in range(5):
            bench.show(healthy_reading(memory_used_bytes=32 * GIB))
        bench.processes = (GpuProcess(OWN_PID, 31 * GIB), GpuProcess(4242, 47 * GIB))
        full = healthy_reading(memory_used_bytes=78 * GIB)
        decisions = [decision for _ in range(60) for decision in bench.show(full)]
        assert [type(each) for each in decisions] == [ReleaseCache, Shrink, Shrink]
        assert texts(decisions)[0] == (
            "98% of the memory of GPU 0 is in use after step 7, some of it by process 4242 with 47.0 GiB: "
            "returning cached memory"
        )
        assert texts(decisions)[1].endswith("shrinking the micro-batch")
        assert bench.asked == 3

    def test_taken_by_a_process_that_cannot_be_told_is_pressure_all_the_same(self) -> None:
        bench = Bench()
        for _ in range(5):
            bench.show(healthy_reading(memory_used_bytes=32 * GIB))
        full = healthy_reading(memory_used_bytes=78 * GIB)
        told = [text for _ in range(3) for text in texts(bench.show(full))]
        assert "some of it by another process:" in told[0]

    def test_is_never_pressure_when_the_driver_lists_us_alone(self) -> None:
        bench = Bench()
        for _ in range(5):
            bench.show(healthy_reading(memory_used_bytes=32 * GIB))
        bench.processes = (GpuProcess(OWN_PID, 78 * GIB),)
        full = healthy_reading(memory_used_bytes=78 * GIB)
        assert [bench.show(full) for _ in range(30)] == [[]] * 30

    def test_of_our_own_leaves_the_driver_unasked(self) -> None:
        bench = Bench()
        bench.memory = reserved(77)
        assert [bench.show(healthy_reading(memory_used_bytes=79 * GIB)) for _ in range(30)] == [[]] * 30
        assert bench.asked == 0

    @pytest.mark.parametrize("why", ["policy", "torch"])
    def test_is_left_alone_when_switched_off_or_when_torch_does_not_use_the_device(self, why: str) -> None:
        bench = Bench(HardwarePolicies(vram=None) if why == "policy" else None)
        if why == "torch":
            bench.memory = allocator_memory(0)
        for used in (32, *[78] * 30):
            assert bench.show(healthy_reading(memory_used_bytes=used * GIB)) == []


class TestDamage:
    def test_ends_the_run_without_a_checkpoint_of_what_cannot_be_trusted(self) -> None:
        bench = Bench()
        bench.show(healthy_reading())
        decisions = bench.show(healthy_reading(ecc_uncorrected_volatile=2))
        end = abort_of(decisions)
        assert isinstance(end.error, GPUError)
        assert not end.save_first
        assert end.error.message == "GPU 0 has failed: 2 uncorrectable ECC errors during the run"
        assert end.error.details["action"] == "reset_gpu"
        assert texts(decisions) == [
            "GPU 0 is not healthy: 2 uncorrectable ECC errors during the run (needed: reset gpu)"
        ]

    def test_that_lets_the_work_at_hand_end_allows_a_checkpoint(self) -> None:
        bench = Bench()
        bench.show(healthy_reading())
        end = abort_of(bench.show(healthy_reading(recovery_action=RecoveryAction.decode(4))))
        assert end.save_first

    def test_of_several_kinds_is_told_whole_and_ends_with_the_gravest(self) -> None:
        bench = Bench()
        bench.show(healthy_reading())
        failed = healthy_reading(ecc_uncorrected_volatile=1, remapped_rows=RemappedRows(0, 1, False, True))
        decisions = bench.show(failed)
        assert len(texts(decisions)) == 2
        assert error_of(decisions).details["action"] == "return_card"

    def test_outweighs_heat_and_blindness(self) -> None:
        bench = Bench(HardwarePolicies(sight=SightPolicy(on_unreadable="abort", grace_s=0.0)))
        for headroom in (20.0, -3.0):
            bench.show(hot(headroom, 0), healthy_reading(1), healthy_reading(2))
        lost = unreadable(1, "GPU-fake-1", "Fake GPU", Unknown("GPU is lost", 15), 0.0)
        end = abort_of(bench.show(hot(-3.0, 0), lost, dark(2)))
        assert end.error.details["condition"] == "lost"
        assert not end.save_first

    def test_before_the_run_is_told_once(self) -> None:
        bench = Bench()
        damaged = healthy_reading(remapped_rows=RemappedRows(0, 1, False, True))
        told = [texts(bench.show(damaged)) for _ in range(20)]
        assert told[0] == [
            "GPU 0 is not healthy: a bad memory row could not be replaced, already so when the run began "
            "(needed: return card)"
        ]
        assert not any(told[1:])

    def test_is_not_looked_for_when_the_policy_is_off(self) -> None:
        bench = Bench(HardwarePolicies(health=None))
        bench.show(healthy_reading())
        assert bench.show(healthy_reading(ecc_uncorrected_volatile=2)) == []


class TestXids:
    def test_are_acted_on_once_with_their_device(self) -> None:
        bench = Bench()
        bench.show(healthy_reading(0), healthy_reading(1))
        xid = Xid(1, 79, 1, "GPU-fake-1", 1.0)
        error = error_of(bench.show(healthy_reading(0), healthy_reading(1), xids=[xid]))
        assert (error.code, error.details["xid"]) == ("RUNTIME_GPU_ERROR", 79)
        assert (error.details["device"], error.details["action"]) == (1, "reboot_node")
        assert bench.show(healthy_reading(0), healthy_reading(1), xids=[xid]) == []

    def test_to_be_recorded_are_recorded_and_nothing_more(self) -> None:
        bench = Bench()
        told = bench.show(healthy_reading(), xids=[Xid(1, 63, 0, "GPU-fake-0", 1.0)])
        assert texts(told) == ["Xid 63: page retirement or row remapping recorded on GPU 0: recorded, nothing to do"]

    def test_of_a_device_that_the_driver_does_not_name_are_those_of_the_only_one(self) -> None:
        bench = Bench()
        error = error_of(bench.show(healthy_reading(), xids=[Xid(1, 48, None, None, 1.0)]))
        assert error.details["device"] == 0

    def test_of_one_among_several_that_is_not_named_end_the_run_without_naming_one(self) -> None:
        bench = Bench()
        xid = Xid(1, 95, None, None, 1.0)
        error = error_of(bench.show(healthy_reading(0), healthy_reading(1), xids=[xid]))
        assert error.message == "GPU has failed: Xid 95: uncontained memory error"
        recorded = Xid(2, 43, None, None, 1.0)
        told = bench.show(healthy_reading(0), healthy_reading(1), xids=[xid, recorded])
        assert texts(told) == ["Xid 43: GPU stopped processing (channel reset) on a GPU: recorded, nothing to do"]

    def test_of_a_device_that_the_run_does_not_use_are_no_concern_of_it(self) -> None:
        bench = Bench(devices={0})
        xid = Xid(1, 79, 1, "GPU-fake-1", 1.0)
        assert bench.show(healthy_reading(0), healthy_reading(1), xids=[xid]) == []

    def test_that_cannot_be_heard_are_said_once(self) -> None:
        bench = Bench()
        deaf = {"GPU-fake-0": Unsupported("NVML delivers Xids on Linux only")}
        told = [texts(bench.show(healthy_reading(), xids_unwatched=deaf)) for _ in range(5)]
        assert told == [["Xid errors of GPU 0 cannot be heard: NVML delivers Xids on Linux only"], [], [], [], []]


class TestBlindness:
    def test_by_silence_is_told_once_with_the_call_that_hangs_and_so_is_its_end(self) -> None:
        bench = Bench()
        bench.show(healthy_reading())
        told = [text for _ in range(500) for text in texts(bench.again(SILENCE, 0.1))]
        assert told == [
            "the state of the GPUs is unknown after step 7: "
            "no reading for 6.1 s: nvmlDeviceGetPowerUsage has not returned"
        ]
        assert texts(bench.show(healthy_reading())) == ["the sensors of the GPUs can be read again after 51 s"]

    def test_ends_a_run_that_may_not_be_blind_after_the_time_of_grace_and_a_checkpoint(self) -> None:
        bench = Bench(HardwarePolicies(sight=SightPolicy(on_unreadable="abort")))
        bench.show(healthy_reading())
        assert isinstance(bench.again(SILENCE)[0], Warn)
        assert bench.again(SILENCE, 19.9) == []
        end = abort_of(bench.again(SILENCE, 0.2))
        assert isinstance(end.error, GPUMonitoringError)
        assert end.error.code == "RUNTIME_GPU_MONITORING_FAILED"
        assert end.save_first

    def test_without_a_driver_is_told_once_as_unknown(self) -> None:
        bench = Bench()
        absent = bench.sample(reason="no NVIDIA driver here")
        assert texts(bench.again(absent)) == ["the state of the hardware is unknown: no NVIDIA driver here"]
        assert [bench.again(absent) for _ in range(50)] == [[]] * 50

    def test_without_a_driver_ends_a_run_that_may_not_be_blind_at_once(self) -> None:
        bench = Bench(HardwarePolicies(sight=SightPolicy(on_unreadable="abort")))
        error = error_of(bench.show(reason="no NVIDIA driver here"))
        assert error.message == "the GPU sensors cannot be read: no NVIDIA driver here"

    def test_of_the_devices_in_use_alone_is_blindness_too(self) -> None:
        bench = Bench(devices={3})
        assert "none of the devices in use" in texts(bench.show(healthy_reading(0)))[0]

    def test_before_the_first_sample_is_normal_for_a_while(self) -> None:
        bench = Bench()
        early = Sample(reason="no thread to sample on", taken_at_s=0.0)
        assert [bench.again(early) for _ in range(20)] == [[]] * 20
        assert "no thread to sample on" in texts(bench.again(early))[0]

    def test_of_one_device_is_told_of_that_device_when_it_is_more_than_a_hiccup(self) -> None:
        bench = Bench()
        bench.show(healthy_reading(0), healthy_reading(1))
        told = [texts(bench.show(healthy_reading(0), dark(1))) for _ in range(20)]
        assert [text for each in told for text in each] == [
            "the state of GPU 1 is unknown after step 7: the sensor does not answer"
        ]

    def test_of_the_thermometer_alone_says_what_is_still_watched(self) -> None:
        bench = Bench()
        lost = healthy_reading(temperature_c=MISSING, headroom_c=MISSING, slowdown_headroom_c=MISSING)
        told = [text for _ in range(20) for text in texts(bench.show(lost))]
        assert told == [
            "the temperature of GPU 0 cannot be read (the sensor does not answer): "
            "only its thermal slowdown flag is watched"
        ]


def healthy_runs() -> dict[str, Callable[[int], Reading]]:
    """Ten runs of which nothing is wrong, as a reading for each second."""
    plain = healthy_reading()
    odd = healthy_reading(headroom_c=18.0, headroom_source="slowdown", slowdown_headroom_c=23.0)
    laptop = healthy_reading(headroom_c=12.0, headroom_source="shutdown", slowdown_headroom_c=Unknown("none stated"))
    scarce = healthy_reading(
        clocks_event_reasons=Unsupported("x"),
        ecc_uncorrected_volatile=Unsupported("x"),
        remapped_rows=Unsupported("x"),
        recovery_action=Unsupported("x"),
    )
    return {
        "steady": lambda _: plain,
        "a spike every tenth second": lambda s: hot(-20.0) if s % 10 == 0 else plain,
        "a hiccup every fifth second": lambda s: dark() if s % 5 == 0 else plain,
        "spikes and hiccups": lambda s: hot(-20.0) if s % 10 == 0 else dark() if s % 10 == 5 else plain,
        "flags that flash while clocks change": lambda s: healthy_reading(
            clocks_event_reasons=ClocksEventReasons.decode(0x48 if s % 5 < 2 else 0)
        ),
        "software limits at work": lambda _: healthy_reading(clocks_event_reasons=ClocksEventReasons.decode(0x2C)),
        "limits by an odd threshold": lambda _: odd,
        "a laptop that states little and runs close to it": lambda _: laptop,
        "a device that offers little": lambda _: scarce,
        "our own memory breathing up to the brim": lambda s: healthy_reading(memory_used_bytes=(60 + s % 20) * GIB),
    }


@pytest.mark.parametrize("name", healthy_runs())
def test_a_healthy_run_raises_no_alarm(name: str) -> None:
    bench = Bench()
    decisions: list[Decision] = []
    for second in range(300):
        reading = healthy_runs()[name](second)
        bench.memory = reserved((known(reading.memory_used_bytes) or 0) / GIB - 2)
        decisions += bench.show(reading)
    assert decisions == []


headrooms = st.none() | st.integers(-8, 40).map(float)
usual = st.tuples(headrooms, st.sampled_from([0, 0, 0, 0x40]), st.integers(30, 80))


class TestForAnyTrace:
    @given(st.lists(st.none() | usual, max_size=80))
    def test_decisions_are_consistent(self, trace: list[tuple[float | None, int, int] | None]) -> None:
        bench = Bench()
        paused = False
        for each in trace:
            if each is None:
                decisions = bench.again(SILENCE)
            else:
                headroom, raw, used_gib = each
                reading = hot(
                    30.0 if headroom is None else headroom,
                    clocks_event_reasons=ClocksEventReasons.decode(raw),
                    memory_used_bytes=used_gib * GIB,
                )
                decisions = bench.show(dark() if headroom is None else reading)
            for decision in decisions:
                assert isinstance(decision, Abort) or to_dict(decision.event)["step"] == 7
                assert not (isinstance(decision, Pause) and paused)
                assert not (isinstance(decision, Resume) and not paused)
                paused = paused != isinstance(decision, Pause | Resume)
            if any(isinstance(decision, Abort) for decision in decisions):
                abort_of(decisions)
                return
            assert bench.guard.paused == paused

    @given(st.lists(usual, min_size=1, max_size=40), st.integers(1, 4))
    def test_showing_a_sample_again_changes_nothing(
        self, trace: list[tuple[float | None, int, int]], times: int
    ) -> None:
        once, often = Bench(), Bench()
        for headroom, raw, used_gib in trace:
            reading = hot(
                30.0 if headroom is None else headroom,
                clocks_event_reasons=ClocksEventReasons.decode(raw),
                memory_used_bytes=used_gib * GIB,
            )
            first = once.show(reading)
            second = often.show(reading)
            for _ in range(times):
                second += often.again(often.sample_again(reading), 0.0)
            assert [type(each) for each in first] == [type(each) for each in second]
            if any(isinstance(each, Abort) for each in first):
                return


def test_a_boundary_with_nothing_new_costs_microseconds_for_it_looks_at_nothing() -> None:
    bench = Bench()
    latest = bench.sample(*(healthy_reading(index) for index in range(8)))
    bench.again(latest)
    called: list[str] = []

    def note(frame: Any, event: str, function: Any) -> None:
        if event in ("call", "c_call"):
            called.append(frame.f_code.co_name if event == "call" else function.__name__)

    sys.setprofile(note)
    bench.guard.observe(latest, step=7)
    sys.setprofile(None)
    assert len(called) < 10, called


def test_it_takes_what_a_sampler_of_fake_devices_has() -> None:
    device = FakeDevice()
    source = FakeSource(device)
    guard = HardwareGuard()
    with Sampler(source, period_s=0.001) as sampler:
        source.xid(79, device)
        decisions: list[Decision] = []
        until(lambda: decisions.extend(guard.observe(sampler.latest(), step=3)) or decisions)
    assert error_of(decisions).code == "RUNTIME_GPU_ERROR"
