"""The fakes that ship to users behave as the real thing, within the same protocol."""

from __future__ import annotations

import threading

import pytest

from tests.waiting import LIMIT_S, until
from trainwarden.device import Device, Source, Unsupported
from trainwarden.device.reading import SENSORS
from trainwarden.testing.fake_device import FakeDevice, FakeSource, healthy_reading


def test_fakes_satisfy_the_protocols() -> None:
    device: Device = FakeDevice(3)
    source: Source = FakeSource(FakeDevice())
    assert (device.index, device.uuid, device.name) == (3, "GPU-fake-3", "Fake GPU")
    assert source.unwatched() == {}


def test_a_new_fake_is_healthy_in_every_sensor() -> None:
    reading = FakeDevice(clock=lambda: 7.0).read()
    assert reading == healthy_reading(taken_at_s=7.0, health_taken_at_s=7.0)
    assert reading.missing() == {}


def test_sensors_can_be_set_and_stay() -> None:
    device = FakeDevice(temperature_c=70.0).set(headroom_c=1.0, headroom_source="slowdown")
    device.read()
    reading = device.read()
    assert (reading.temperature_c, reading.headroom_c, reading.headroom_source) == (70.0, 1.0, "slowdown")


def test_a_script_changes_one_reading_after_the_other_and_its_last_stays() -> None:
    device = FakeDevice().script([{"temperature_c": t} for t in (60.0, 95.0, Unsupported("x"))])
    assert [device.read().temperature_c for _ in range(4)] == [60.0, 95.0, Unsupported("x"), Unsupported("x")]


def test_a_sensor_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="temprature_c"):
        FakeDevice(temprature_c=1.0)


def test_a_lost_fake_reads_as_a_lost_gpu() -> None:
    reading = FakeDevice().lose().read()
    assert reading.lost
    assert set(reading.missing()) == set(SENSORS)


def test_a_hanging_fake_holds_its_reader_until_it_is_told_to_go_on() -> None:
    device = FakeDevice().hang()
    reader = threading.Thread(target=device.read, daemon=True)
    reader.start()
    until(lambda: device.reads)
    reader.join(0.02)
    assert reader.is_alive()
    device.resume()
    reader.join(LIMIT_S)
    assert not reader.is_alive()
    assert device.reads == 1


def test_a_source_without_devices_has_a_reason() -> None:
    assert FakeSource().open().reason == "no fake devices"
    assert FakeSource(reason="no driver").open().reason == "no driver"


def test_xids_of_a_source_are_drained_once() -> None:
    device = FakeDevice()
    source = FakeSource(device)
    source.xid(79, device)
    source.xid(13)
    assert source.drain_xids() == [(79, "GPU-fake-0"), (13, None)]
    assert source.drain_xids() == []
