"""One device through the real binding: what is read, and what is said when it cannot be."""

from __future__ import annotations

import pytest

from trainwarden.device import NvmlDevice, Reading, RemappedRows, Unknown, Unsupported, host_memory
from trainwarden.device.nvml import GpuProcess
from trainwarden.device.reading import SENSORS
from trainwarden.testing.fake_device import healthy_reading

from .stand_in import GIB, StandIn


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def read(uuid: str = "GPU-0", **options: object) -> Reading:
    return NvmlDevice(0, uuid, "Stand-in GPU", **options).read()  # type: ignore[arg-type]


def test_a_healthy_gpu_is_read_whole(nvml_here: StandIn) -> None:
    expected = healthy_reading(
        uuid="GPU-0",
        name="Stand-in GPU",
        taken_at_s=100.0,
        health_taken_at_s=100.0,
        memory_used_bytes=41 * GIB,
    )
    assert read(clock=Clock()) == expected


def test_every_sensor_that_a_device_lacks_is_unsupported_and_never_zero(nvml_here: StandIn) -> None:
    nvml_here.set(dict.fromkeys(nvml_here.keys() - {"devices", "memory_total"}))
    reading = read()
    assert set(reading.missing()) == set(SENSORS) - {"memory_used_bytes", "memory_total_bytes"}
    assert all(isinstance(value, Unsupported) for value in reading.missing().values())


class TestTheNineFaults:
    """Of resilience.md §8, as far as this room goes: seen, in the right field, never as health."""

    def test_95_degrees_without_a_margin_leave_no_headroom(self, nvml_here: StandIn) -> None:
        nvml_here.set({"margin": None, "temperature": 95})
        reading = read()
        assert (reading.temperature_c, reading.headroom_c, reading.headroom_source) == (95.0, -8.0, "gpu_max")
        assert reading.slowdown_headroom_c == -6.0

    def test_95_degrees_with_a_margin_show_the_margin_below_the_slowdown_offset(self, nvml_here: StandIn) -> None:
        nvml_here.set(margin=-6, temperature=95)
        reading = read()
        assert (reading.headroom_c, reading.slowdown_headroom_c, reading.headroom_source) == (
            -6.0,
            -4.0,
            "margin",
        )

    def test_95_degrees_on_a_device_that_states_no_limit_are_judged_by_an_assumed_one_and_that_is_said(
        self, nvml_here: StandIn
    ) -> None:
        nvml_here.set(dict.fromkeys(("margin", "gpu_max", "slowdown", "shutdown")), temperature=95)
        reading = read()
        assert (reading.headroom_c, reading.headroom_source) == (-12.0, "assumed")
        assert "assumed" in reading.headroom_note
        assert isinstance(reading.slowdown_headroom_c, Unknown)

    def test_hardware_thermal_slowdown_shows_among_the_reasons(self, nvml_here: StandIn) -> None:
        nvml_here.set(reasons=0x48)
        reasons = read().clocks_event_reasons
        assert not isinstance(reasons, Unsupported | Unknown)
        assert reasons.names == {"hw_slowdown", "hw_thermal_slowdown"}
        assert reasons.thermal

    def test_a_failed_row_remapping_shows(self, nvml_here: StandIn) -> None:
        nvml_here.set(rows="3,2,1,1")
        assert read().remapped_rows == RemappedRows(3, 2, pending=True, failed=True)

    def test_uncorrectable_ecc_errors_show_by_their_span(self, nvml_here: StandIn) -> None:
        nvml_here.set(ecc_volatile=3, ecc_aggregate=7)
        reading = read()
        assert (reading.ecc_uncorrected_volatile, reading.ecc_uncorrected_aggregate) == (3, 7)

    def test_a_recovery_action_shows_on_a_new_driver(self, nvml_here: StandIn) -> None:
        nvml_here.set({"field.230": 1})
        action = read().recovery_action
        assert not isinstance(action, Unsupported | Unknown)
        assert action.needed
        assert str(action) == "gpu_reset"

    @pytest.mark.parametrize("code", [2, 3])
    def test_an_old_driver_does_not_know_the_field_which_is_not_health(self, nvml_here: StandIn, code: int) -> None:
        nvml_here.set({"field_err.230": code})
        action = read().recovery_action
        assert isinstance(action, Unsupported)
        assert action.nvml_code == code

    def test_an_unsupported_field_leaves_the_others_readable(self, nvml_here: StandIn) -> None:
        nvml_here.set({"err.nvmlDeviceGetPowerUsage": 3})
        reading = read()
        assert isinstance(reading.power_w, Unsupported)
        assert set(reading.missing()) == {"power_w"}

    def test_a_lost_gpu_is_unknown_in_every_sensor_and_known_to_be_lost(self, nvml_here: StandIn) -> None:
        device = NvmlDevice(0, "GPU-0", "Stand-in GPU")
        assert not device.read().lost
        nvml_here.set({"gpu0.err": 15})
        reading = device.read()
        assert reading.lost
        assert isinstance(reading.temperature_c, Unknown)
        assert "GPU is lost" in reading.temperature_c.reason


class TestFieldValues:
    def test_an_offset_is_read_signed_by_its_type(self, nvml_here: StandIn) -> None:
        nvml_here.set({"field.194": -3, "field_type.194": 5})
        assert read().slowdown_headroom_c == 30.0

    def test_an_offset_that_the_driver_labels_unsigned_is_signed_all_the_same(self, nvml_here: StandIn) -> None:
        nvml_here.set({"field.194": -3, "field_type.194": 1})
        assert read().slowdown_headroom_c == 30.0

    @pytest.mark.parametrize("value_type", [0, 3, 4, 6])
    def test_the_other_types_of_the_union_are_read_as_what_they_are(self, nvml_here: StandIn, value_type: int) -> None:
        nvml_here.set({"field.230": 2, "field_type.230": value_type})
        assert str(read().recovery_action) == "node_reboot"

    def test_a_type_of_the_future_is_unknown(self, nvml_here: StandIn) -> None:
        nvml_here.set({"field_type.230": 42})
        assert read().recovery_action == Unknown("field 230 has the unknown value type 42")

    def test_an_error_of_the_whole_call_is_the_reason_of_every_field(self, nvml_here: StandIn) -> None:
        nvml_here.set({"err.nvmlDeviceGetFieldValues": 999})
        reading = read()
        assert isinstance(reading.recovery_action, Unknown)
        assert isinstance(reading.nvlink_errors, Unknown)

    def test_link_errors_add_up_over_the_counters_that_exist(self, nvml_here: StandIn) -> None:
        nvml_here.set({"field.38": 5, "field.45": None, "field.52": 2, "field.162": 1})
        assert read().nvlink_errors == 8

    def test_a_gpu_without_links_has_no_link_errors_to_count(self, nvml_here: StandIn) -> None:
        nvml_here.set({"field.38": None})
        assert isinstance(read().nvlink_errors, Unsupported)


class TestErrors:
    @pytest.mark.parametrize("code", [3, 13, 22, 25, 26])
    def test_what_is_not_offered_is_unsupported(self, nvml_here: StandIn, code: int) -> None:
        nvml_here.set({"err.nvmlDeviceGetUtilizationRates": code})
        value = read().utilization_percent
        assert isinstance(value, Unsupported)
        assert value.nvml_code == code

    @pytest.mark.parametrize("code", [2, 4, 10, 15, 16, 17, 18, 20, 28, 999, 12345])
    def test_what_should_be_there_and_is_not_is_unknown(self, nvml_here: StandIn, code: int) -> None:
        nvml_here.set({"err.nvmlDeviceGetUtilizationRates": code})
        value = read().utilization_percent
        assert isinstance(value, Unknown)
        assert value.nvml_code == code
        assert "nvmlDeviceGetUtilizationRates" in value.reason

    def test_a_gpu_that_asks_for_a_reset_is_known_to(self, nvml_here: StandIn) -> None:
        nvml_here.set({"gpu0.err.nvmlDeviceGetPowerUsage": 16})
        assert read().reset_required

    def test_a_number_that_means_not_available_is_unknown(self, nvml_here: StandIn) -> None:
        nvml_here.set(pcie_replays=4294967295)
        assert isinstance(read().pcie_replays, Unknown)

    def test_an_impossible_temperature_is_unknown(self, nvml_here: StandIn) -> None:
        nvml_here.set({"temperature": 255, "margin": None})
        reading = read()
        assert isinstance(reading.temperature_c, Unknown)
        assert isinstance(reading.headroom_c, Unknown)

    def test_a_uuid_that_is_gone_is_a_reading_with_the_reason(self, nvml_here: StandIn) -> None:
        reading = read("GPU-gone")
        assert reading.uuid == "GPU-gone"
        assert set(reading.missing()) == set(SENSORS)

    def test_nvml_that_another_user_shut_down_is_initialised_anew(self, nvml_here: StandIn) -> None:
        import pynvml

        device = NvmlDevice(0, "GPU-0", "Stand-in GPU")
        device.read()
        pynvml.nvmlShutdown()
        assert device.read().temperature_c == 60.0


class TestMemory:
    def test_what_is_not_free_counts_as_used(self, nvml_here: StandIn) -> None:
        nvml_here.set(memory_used=10 * GIB, memory_reserved=2 * GIB)
        reading = read()
        assert (reading.memory_used_bytes, reading.memory_total_bytes) == (12 * GIB, 80 * GIB)
        assert reading.memory_source == "device"

    def test_a_unified_memory_part_falls_back_to_the_host_and_says_so(self, nvml_here: StandIn) -> None:
        nvml_here.set({"memory_total": None})
        reading = read()
        assert reading.memory_total_bytes == host_memory().total_bytes
        assert reading.memory_source == "host"

    def test_memory_that_cannot_be_read_is_unknown_and_not_the_hosts(self, nvml_here: StandIn) -> None:
        nvml_here.set({"err.nvmlDeviceGetMemoryInfo_v2": 4})
        reading = read()
        assert isinstance(reading.memory_used_bytes, Unknown)
        assert reading.memory_source == "device"

    def test_no_memory_at_all_is_unknown_and_not_full(self, nvml_here: StandIn) -> None:
        nvml_here.set(memory_total=0, memory_used=0, memory_reserved=0)
        assert isinstance(read().memory_total_bytes, Unknown)


class TestAnOldDriver:
    def test_is_read_through_the_older_calls(self, old_nvml_here: StandIn) -> None:
        old_nvml_here.set(reasons=0x40)
        reading = read()
        assert reading.temperature_c == 60.0
        assert reading.memory_used_bytes == 41 * GIB
        assert str(reading.clocks_event_reasons) == "hw_thermal_slowdown"

    def test_has_no_margin_so_the_thresholds_count(self, old_nvml_here: StandIn) -> None:
        reading = read()
        assert (reading.headroom_c, reading.headroom_source) == (27.0, "gpu_max")
        assert "no margin" in reading.headroom_note


class TestTheSlowSensors:
    def test_are_read_every_15_seconds_and_carry_their_own_time(self, nvml_here: StandIn) -> None:
        clock = Clock()
        device = NvmlDevice(0, "GPU-0", "Stand-in GPU", clock=clock)
        device.read()
        nvml_here.set(ecc_volatile=1, temperature=61)
        clock.now_s = 114.0
        early = device.read()
        assert (early.temperature_c, early.ecc_uncorrected_volatile, early.health_taken_at_s) == (
            61.0,
            0,
            100.0,
        )
        clock.now_s = 115.0
        late = device.read()
        assert (late.ecc_uncorrected_volatile, late.taken_at_s, late.health_taken_at_s) == (1, 115.0, 115.0)

    def test_are_not_asked_for_in_between(self, nvml_here: StandIn) -> None:
        device = NvmlDevice(0, "GPU-0", "Stand-in GPU", clock=Clock())
        for _ in range(5):
            device.read()
        names = [name for _, name in nvml_here.calls()]
        assert names.count("nvmlDeviceGetRemappedRows") == 1
        assert names.count("nvmlDeviceGetTemperatureV") == 5

    def test_processes_are_never_asked_for_by_a_reading(self, nvml_here: StandIn) -> None:
        read()
        assert not [name for _, name in nvml_here.calls() if "Processes" in name]


class TestProcesses:
    def test_are_listed_with_their_memory(self, nvml_here: StandIn) -> None:
        nvml_here.set(processes="100:1024,200:2048")
        found = NvmlDevice(0, "GPU-0", "GPU").processes()
        assert found == (GpuProcess(100, 1024), GpuProcess(200, 2048))

    def test_of_which_the_driver_hides_the_memory_say_so(self, nvml_here: StandIn) -> None:
        nvml_here.set(processes="100")
        (process,) = NvmlDevice(0, "GPU-0", "GPU").processes()  # type: ignore[misc]
        assert isinstance(process.used_bytes, Unsupported)

    def test_may_be_none(self, nvml_here: StandIn) -> None:
        nvml_here.set(processes="")
        assert NvmlDevice(0, "GPU-0", "GPU").processes() == ()

    def test_that_cannot_be_listed_give_the_reason(self, nvml_here: StandIn) -> None:
        nvml_here.set({"err.nvmlDeviceGetComputeRunningProcesses_v3": 4})
        assert isinstance(NvmlDevice(0, "GPU-0", "GPU").processes(), Unknown)


def test_a_mig_part_has_its_own_memory_and_the_sensors_of_its_card(nvml_here: StandIn) -> None:
    nvml_here.set({"mig": 1, "mig_count": 2, "mig1.memory_total": 10 * GIB, "mig1.memory_used": GIB})
    reading = read("MIG-0-1", gpu_uuid="GPU-0")
    assert (reading.memory_total_bytes, reading.memory_used_bytes) == (10 * GIB, 2 * GIB)
    assert reading.temperature_c == 60.0
    assert reading.mig_enabled is True
