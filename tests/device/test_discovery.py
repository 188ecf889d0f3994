from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest

from trainwarden.device import (
    DeviceList,
    NvmlDevice,
    Unknown,
    Unsupported,
    binding,
    cuda_driver_version,
    driver_version,
    list_devices,
    snapshot,
)

from .stand_in import GIB, HOUR_MS, StandIn

LIST = """
found = list_devices()
say({"devices": [[d.index, d.uuid, d.name] for d in found.devices], "reason": found.reason})
"""


def uuids(found: DeviceList) -> list[str]:
    return [device.uuid for device in found.devices]


def test_every_gpu_is_listed_in_order_with_its_name(nvml_here: StandIn) -> None:
    nvml_here.set({"devices": 2, "gpu0.name": "H100", "gpu1.name": "H100"})
    found = list_devices()
    assert [(d.index, d.uuid, d.name) for d in found.devices] == [(0, "GPU-0", "H100"), (1, "GPU-1", "H100")]
    assert found.reason == ""


class TestTheRightGpu:
    @pytest.mark.parametrize("setting", ["1", "GPU-1"])
    def test_is_read_under_cuda_visible_devices(
        self, nvml_here: StandIn, monkeypatch: pytest.MonkeyPatch, setting: str
    ) -> None:
        nvml_here.set({"devices": 2, "gpu1.temperature": 77, "gpu1.field.230": 1, "gpu0.field.230": 0})
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
        (device,) = list_devices().devices
        reading = device.read()
        assert (device.index, device.uuid, reading.temperature_c) == (0, "GPU-1", 77.0)
        assert str(reading.recovery_action) == "gpu_reset"

    def test_is_found_in_a_fresh_process_too(self, machine: StandIn) -> None:
        machine.set(devices=4)
        assert machine.run(LIST, CUDA_VISIBLE_DEVICES="3,GPU-x")["devices"] == [[0, "GPU-3", "Stand-in GPU"]]

    def test_follows_torch_when_cuda_is_already_in_use(
        self, nvml_here: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nvml_here.set(devices=2)
        monkeypatch.setitem(sys.modules, "torch", torch_that_sees("1", "0"))
        assert [(d.index, d.uuid) for d in list_devices().devices] == [(0, "GPU-1"), (1, "GPU-0")]

    def test_is_doubted_aloud_when_torch_sees_others(self, nvml_here: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch", torch_that_sees("7"))
        found = list_devices()
        assert uuids(found) == ["GPU-0"]
        assert "other device UUIDs" in found.reason


def torch_that_sees(*bare_uuids: str) -> SimpleNamespace:
    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        device_count=lambda: len(bare_uuids),
        get_device_properties=lambda index: SimpleNamespace(uuid=bare_uuids[index]),
    )
    return SimpleNamespace(cuda=cuda)


class TestAnEmptyList:
    @pytest.mark.parametrize("setting", ["", "-1", "none", "7", "GPU-zzz"])
    def test_says_which_setting_hides_the_gpus(
        self, nvml_here: StandIn, monkeypatch: pytest.MonkeyPatch, setting: str
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
        found = list_devices()
        assert found.devices == ()
        assert "CUDA_VISIBLE_DEVICES" in found.reason

    def test_says_that_the_driver_lists_none(self, nvml_here: StandIn) -> None:
        nvml_here.set(devices=0)
        assert list_devices() == DeviceList((), "the NVIDIA driver lists no GPU")

    def test_says_that_nvml_cannot_be_initialised(self, nvml_here: StandIn) -> None:
        nvml_here.set({"err.nvmlInitWithFlags": 9})
        found = list_devices()
        assert found.devices == ()
        assert "Driver Not Loaded" in found.reason

    def test_says_that_the_devices_cannot_be_counted(self, nvml_here: StandIn) -> None:
        nvml_here.set({"err.nvmlDeviceGetCount_v2": 999})
        assert "cannot count" in list_devices().reason

    def test_says_that_there_is_no_driver(self, machine: StandIn) -> None:
        answer = machine.run(LIST, LD_LIBRARY_PATH="")
        assert answer == {
            "devices": [],
            "reason": "no NVIDIA driver here: its NVML library was not found",
        }

    def test_says_that_the_binding_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(binding, "_current", None)
        monkeypatch.setitem(sys.modules, "pynvml", None)
        assert "nvidia-ml-py cannot be imported" in list_devices().reason


def test_a_gpu_that_cannot_be_opened_keeps_its_place_and_its_reason(nvml_here: StandIn) -> None:
    nvml_here.set({"devices": 2, "gpu0.err.nvmlDeviceGetHandleByIndex_v2": 15})
    found = list_devices()
    assert [device.index for device in found.devices] == [0, 1]
    assert found.devices[0].read().lost
    assert found.devices[1].read().temperature_c == 60.0
    assert "GPU 0" in found.reason
    assert "GPU is lost" in found.reason


class TestMig:
    def test_a_part_is_chosen_by_its_uuid(self, nvml_here: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        nvml_here.set({"mig": 1, "mig_count": 2, "mig1.memory_total": 10 * GIB, "gpu0.mig1.uuid": "MIG-abc"})
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-abc")
        (device,) = list_devices().devices
        assert isinstance(device, NvmlDevice)
        assert (device.index, device.uuid, device.gpu_uuid) == (0, "MIG-abc", "GPU-0")
        assert device.read().memory_total_bytes == 10 * GIB

    def test_a_part_is_found_by_its_legacy_name(self, nvml_here: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        nvml_here.set(mig=1, mig_count=2)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-GPU-0/2/0")
        assert uuids(list_devices()) == ["MIG-0-1"]


class TestADriverThatHangs:
    def test_is_given_up_after_the_deadline_with_the_call_named(self, machine: StandIn) -> None:
        machine.set({"sleep_ms.nvmlInitWithFlags": HOUR_MS})
        answer = machine.run(
            """
            from trainwarden.device import deadline

            class Ask(threading.Thread):
                def join(self, timeout):  # the deadline begins with the call, however busy the machine is
                    until(lambda: inside(self, "nvmlInit"))
                    super().join(timeout)

            deadline.threading.Thread = Ask
            found = list_devices(deadline_s=0.2)
            say({"reason": found.reason, "devices": len(found.devices)})
            """
        )
        assert answer["reason"] == "nvmlInit did not answer within 0.2 s"
        assert answer["devices"] == 0

    def test_is_silent_to_a_snapshot(self, machine: StandIn) -> None:
        machine.set({"sleep_ms.nvmlDeviceGetPowerUsage": HOUR_MS})
        answer = machine.run(
            """
            from trainwarden.device import sampler

            class Worker(sampler._Worker):
                def begin(self):  # the deadline begins with the call, however busy the machine is
                    super().begin()
                    until(lambda: inside(self.thread, "nvmlDeviceGetPowerUsage"))

            sampler._Worker = Worker
            say(str(snapshot(deadline_s=0.3)))
            """
        )
        assert re.fullmatch(r"no reading for \d+\.\d s: nvmlDeviceGetPowerUsage has not returned", answer)


def test_a_snapshot_reads_every_device_once(nvml_here: StandIn) -> None:
    nvml_here.set({"devices": 2, "gpu1.temperature": 71})
    sample = snapshot()
    assert [reading.temperature_c for reading in sample.readings] == [60.0, 71.0]  # type: ignore[union-attr]


class TestVersions:
    def test_are_those_of_the_driver(self, nvml_here: StandIn) -> None:
        nvml_here.set(driver_version="570.86.15")
        assert driver_version() == "570.86.15"
        assert cuda_driver_version() == "12.8"

    def test_are_missing_with_a_reason(self, nvml_here: StandIn) -> None:
        nvml_here.set({"err.nvmlSystemGetDriverVersion": 999, "err.nvmlSystemGetCudaDriverVersion_v2": 3})
        assert isinstance(driver_version(), Unknown)
        assert isinstance(cuda_driver_version(), Unsupported)


def test_the_room_imports_neither_torch_nor_nvml(machine: StandIn) -> None:
    assert machine.run("say([name for name in ('torch', 'pynvml') if name in sys.modules])") == []


def test_listing_devices_does_not_import_torch(machine: StandIn) -> None:
    assert machine.run("list_devices(); say('torch' in sys.modules)") is False
