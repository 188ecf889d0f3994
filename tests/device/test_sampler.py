"""The sampler over fake devices: what its consumer sees, by a clock of the test's own."""

from __future__ import annotations

import gc
import sys
import threading
from typing import Any

import pytest

from tests.waiting import LIMIT_S, until
from trainwarden.device import DeviceList, Reading, Sample, Sampler, SensorSilent, Unknown, snapshot
from trainwarden.testing.fake_device import FakeDevice, FakeSource


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def sampled(sampler: Sampler, sequence: int = 1) -> Sample:
    def reached() -> Sample | None:
        latest = sampler.latest()
        return latest if isinstance(latest, Sample) and latest.sequence >= sequence else None

    found = until(reached)
    assert isinstance(found, Sample)
    return found


class TestASampler:
    def test_reads_every_device_in_torchs_order(self) -> None:
        with Sampler(FakeSource(FakeDevice(0), FakeDevice(1, temperature_c=80.0))) as sampler:
            sample = sampled(sampler)
        assert [(r.index, r.temperature_c) for r in sample.readings] == [(0, 60.0), (1, 80.0)]
        assert sample.reason == ""

    def test_follows_what_the_devices_say(self) -> None:
        device = FakeDevice().script([{"temperature_c": 61.0}, {"temperature_c": 62.0}])
        with Sampler(FakeSource(device), period_s=0.001) as sampler:
            assert sampled(sampler, 3).readings[0].temperature_c == 62.0

    def test_says_so_before_its_first_sample_and_when_it_does_not_run(self) -> None:
        device = FakeDevice().hang()
        sampler = Sampler(FakeSource(device))
        idle = sampler.latest()
        assert isinstance(idle, Sample)
        assert (idle.reason, idle.readings) == ("the sampler is not running", ())
        with sampler:
            first = sampler.latest()
            assert isinstance(first, Sample)
            assert (first.reason, first.sequence, first.readings) == ("no sample was taken yet", 0, ())
            device.resume()

    def test_starts_once(self) -> None:
        with Sampler(FakeSource(FakeDevice())) as sampler:
            worker = sampler._worker
            assert sampler.start() is sampler
            assert sampler._worker is worker

    def test_can_be_closed_twice_and_started_again(self) -> None:
        sampler = Sampler(FakeSource(FakeDevice()))
        assert sampler.close()
        with sampler:
            sampled(sampler)
        assert sampler.close()
        with sampler:
            assert sampled(sampler).readings

    def test_that_is_dropped_stops_its_thread(self) -> None:
        sampler = Sampler(FakeSource(FakeDevice()), period_s=0.001).start()
        thread = sampler._worker.thread  # type: ignore[union-attr]
        del sampler
        gc.collect()
        thread.join(LIMIT_S)
        assert not thread.is_alive()

    def test_answers_in_microseconds_for_it_asks_nothing_but_the_clock(self) -> None:
        called: list[str] = []

        def note(frame: Any, event: str, function: Any) -> None:
            if event in ("call", "c_call"):
                called.append(frame.f_code.co_name if event == "call" else function.__name__)

        with Sampler(FakeSource(FakeDevice()), clock=Clock()) as sampler:
            sampled(sampler)
            sys.setprofile(note)
            sampler.latest()
            sys.setprofile(None)
        assert called == ["latest", "getpid", "__call__", "setprofile"]


class TestWithoutADevice:
    def test_there_is_one_reason_and_no_thread_running_on(self) -> None:
        with Sampler(FakeSource(reason="no NVIDIA driver here"), period_s=0.001) as sampler:
            sample = sampled(sampler)
            thread = sampler._worker.thread  # type: ignore[union-attr]
            thread.join(LIMIT_S)
            assert not thread.is_alive()
            assert (sample.readings, sample.reason, sample.sequence) == ((), "no NVIDIA driver here", 1)

    def test_there_is_never_silence(self) -> None:
        clock = Clock()
        with Sampler(FakeSource(), clock=clock) as sampler:
            sampler._worker.thread.join(LIMIT_S)  # type: ignore[union-attr]
            clock.now_s += 1e6
            assert isinstance(sampler.latest(), Sample)


class TestSilence:
    def test_is_reported_once_period_and_deadline_have_passed(self) -> None:
        clock = Clock()
        device = FakeDevice()
        with Sampler(FakeSource(device), period_s=0.25, deadline_s=5.75, clock=clock) as sampler:
            sampled(sampler)
            device.hang()
            reads = device.reads
            until(lambda: device.reads > reads)  # hangs: from here on no sample is complete
            clock.now_s += 6.0
            assert isinstance(sampler.latest(), Sample)
            clock.now_s += 0.1
            silent = sampler.latest()
            assert isinstance(silent, SensorSilent)
            assert silent.silent_s == pytest.approx(6.1)
            assert silent.last.readings[0].temperature_c == 60.0
            assert str(silent) == "no reading for 6.1 s"
            device.resume()

    def test_ends_with_the_next_sample(self) -> None:
        clock = Clock()
        device = FakeDevice().hang()
        with Sampler(FakeSource(device), period_s=0.001, clock=clock) as sampler:
            clock.now_s += 60.0
            assert isinstance(sampler.latest(), SensorSilent)
            device.resume()
            assert sampled(sampler).readings[0].temperature_c == 60.0

    def test_covers_a_source_that_never_opens(self) -> None:
        clock, opened = Clock(), threading.Event()

        class Stuck(FakeSource):
            def open(self) -> DeviceList:
                opened.wait()
                return DeviceList((), "")

        with Sampler(Stuck(), clock=clock) as sampler:
            clock.now_s += 6.1
            silent = sampler.latest()
            assert isinstance(silent, SensorSilent)
            assert silent.last.sequence == 0
            opened.set()

    def test_does_not_hold_up_closing(self) -> None:
        device = FakeDevice().hang()
        sampler = Sampler(FakeSource(device)).start()
        until(lambda: device.reads)
        assert sampler.close(0.05) is False, "the device hangs until it is told to go on, and did not hold up this"
        device.resume()


class TestWhatASourceRaises:
    def test_on_opening_is_the_reason_of_an_empty_list(self) -> None:
        class Broken(FakeSource):
            def open(self) -> DeviceList:
                raise RuntimeError("no bus")

        with Sampler(Broken()) as sampler:
            assert sampled(sampler).reason == "the devices cannot be listed: RuntimeError: no bus"

    def test_on_reading_is_an_unknown_reading_of_that_device_alone(self) -> None:
        class Broken(FakeDevice):
            def read(self) -> Reading:
                raise OSError("bad cable")

        with Sampler(FakeSource(Broken(0), FakeDevice(1)), period_s=0.001) as sampler:
            broken, healthy = sampled(sampler, 2).readings
        assert broken.temperature_c == Unknown("OSError: bad cable")
        assert healthy.temperature_c == 60.0

    def test_on_xids_leaves_the_readings_and_says_that_no_xid_is_heard(self) -> None:
        class Deaf(FakeSource):
            def drain_xids(self) -> list[tuple[int, str | None]]:
                raise OSError("no events")

        with Sampler(Deaf(FakeDevice())) as sampler:
            sample = sampled(sampler)
        assert sample.readings[0].temperature_c == 60.0
        assert sample.xids_unwatched == {"GPU-fake-0": Unknown("OSError: no events")}


class TestXids:
    def test_are_delivered_with_device_and_sequence_and_stay(self) -> None:
        devices = FakeDevice(0), FakeDevice(1)
        source = FakeSource(*devices)
        with Sampler(source, period_s=0.001) as sampler:
            source.xid(79, devices[1])
            source.xid(31)
            until(lambda: len(sampler.latest().xids) == 2)  # type: ignore[union-attr]
            sampled(sampler, sampler.latest().sequence + 2)  # type: ignore[union-attr]
            first, second = sampled(sampler).xids
        assert (first.sequence, first.code, first.index, first.uuid) == (1, 79, 1, "GPU-fake-1")
        assert (second.sequence, second.code, second.index, second.uuid) == (2, 31, None, None)

    def test_are_kept_to_the_last_256(self) -> None:
        source = FakeSource(FakeDevice())
        for code in range(300):
            source.xid(code)
        with Sampler(source) as sampler:
            xids = sampled(sampler).xids
        assert [xid.code for xid in xids] == list(range(44, 300))
        assert xids[-1].sequence == 300


def test_a_snapshot_is_one_sample_of_any_source() -> None:
    sample = snapshot(FakeSource(FakeDevice(temperature_c=70.0)))
    assert isinstance(sample, Sample)
    assert sample.readings[0].temperature_c == 70.0


def test_a_snapshot_of_a_hanging_device_is_silence_after_the_deadline() -> None:
    device = FakeDevice().hang()
    silent = snapshot(FakeSource(device), deadline_s=0.05)
    assert isinstance(silent, SensorSilent), "the device hangs until it is told to go on"
    assert silent.silent_s >= 0.05
    device.resume()
