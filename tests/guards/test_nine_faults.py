"""The nine faults of a GPU, scripted in a stand-in driver, through the real binding to the right error code."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.device.stand_in import GIB, HOUR_MS, StandIn
from trainwarden.device import AllocatorMemory, snapshot
from trainwarden.errors import GPUError, GPUTemperatureError, WardenError
from trainwarden.guards.decisions import Abort, Decision, Pause, ReleaseCache
from trainwarden.guards.hardware import HardwareGuard

Look = Callable[[], list[Decision]]


@pytest.fixture
def look(nvml_here: StandIn) -> Iterator[Look]:
    """One step boundary a second, after the first of which the GPU was well."""
    yield from _looking()


@pytest.fixture
def look_old(old_nvml_here: StandIn) -> Iterator[Look]:
    yield from _looking()


def _looking() -> Iterator[Look]:
    seconds = iter(range(1_000_000))
    guard = HardwareGuard(clock=lambda: float(next(seconds)))

    def look() -> list[Decision]:
        return guard.observe(snapshot(), step=5)

    assert look() == []
    yield look


def error_of(decisions: list[Decision]) -> WardenError:
    assert isinstance(decisions[-1], Abort)
    return decisions[-1].error


class TestTheNineFaults:
    @pytest.mark.parametrize("margin", [-6, None], ids=["margin", "thresholds only"])
    def test_1_95_degrees_end_the_run_at_the_second_sample(
        self, nvml_here: StandIn, look: Look, margin: int | None
    ) -> None:
        nvml_here.set(temperature=95, margin=margin)
        assert look() == []
        error = error_of(look())
        assert isinstance(error, GPUTemperatureError)
        assert error.code == "RUNTIME_GPU_TEMPERATURE_CRITICAL"
        assert error.details["temperature_c"] == 95.0

    def test_1_95_degrees_pause_a_device_that_states_no_limit_and_then_end_the_run(
        self, nvml_here: StandIn, look: Look
    ) -> None:
        nvml_here.set(dict.fromkeys(("margin", "gpu_max", "slowdown", "shutdown", "field.194")), temperature=95)
        assert look() == []
        (pause,) = look()
        assert isinstance(pause, Pause)
        decisions: list[Decision] = []
        for _ in range(200):
            decisions = look()
            if decisions:
                break
        assert error_of(decisions).code == "RUNTIME_GPU_TEMPERATURE_CRITICAL"

    @pytest.mark.parametrize("driver", ["new", "old"])
    def test_2_hardware_thermal_slowdown_pauses(self, request: pytest.FixtureRequest, driver: str) -> None:
        stand_in: StandIn = request.getfixturevalue("nvml_here" if driver == "new" else "old_nvml_here")
        look: Look = request.getfixturevalue("look" if driver == "new" else "look_old")
        stand_in.set(reasons=0x48)
        assert [look(), look()] == [[], []]
        (pause,) = look()
        assert isinstance(pause, Pause)
        assert "slowed down by its hardware for heat" in str(pause.event)

    def test_3_a_failed_row_remapping_returns_the_card(self, nvml_here: StandIn, look: Look) -> None:
        nvml_here.set(rows="3,2,0,1")
        error = error_of(look())
        assert isinstance(error, GPUError)
        assert (error.code, error.details["action"]) == ("RUNTIME_GPU_ERROR", "return_card")

    def test_4_uncorrectable_ecc_errors_need_a_reset(self, nvml_here: StandIn, look: Look) -> None:
        nvml_here.set(ecc_volatile=3, ecc_aggregate=7)
        error = error_of(look())
        assert (error.code, error.details["action"]) == ("RUNTIME_GPU_ERROR", "reset_gpu")
        assert error.message == "GPU 0 has failed: 3 uncorrectable ECC errors during the run"

    def test_5_a_recovery_action_is_taken_from_a_new_driver(self, nvml_here: StandIn, look: Look) -> None:
        nvml_here.set({"field.230": 1})
        error = error_of(look())
        assert (error.code, error.details["condition"]) == ("RUNTIME_GPU_ERROR", "recovery_action")
        assert error.details["action"] == "reset_gpu"

    def test_5_and_from_an_old_one_that_only_refuses_to_read(self, old_nvml_here: StandIn, look_old: Look) -> None:
        old_nvml_here.set({"field.230": None, "gpu0.err": 16})
        error = error_of(look_old())
        assert (error.code, error.details["condition"]) == ("RUNTIME_GPU_ERROR", "reset_required")
        assert error.details["action"] == "reset_gpu"

    @pytest.mark.parametrize(("sick", "found"), [(1, True), (0, False)])
    def test_6_the_gpu_that_is_judged_is_the_one_that_cuda_sees(
        self, nvml_here: StandIn, monkeypatch: pytest.MonkeyPatch, sick: int, found: bool
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        nvml_here.set(devices=2)
        (look,) = _looking()
        nvml_here.set({f"gpu{sick}.ecc_volatile": 1})
        decisions = look()
        assert bool(decisions) == found
        if found:
            error = error_of(decisions)
            assert (error.code, error.details["device"], error.details["uuid"]) == ("RUNTIME_GPU_ERROR", 0, "GPU-1")

    def test_7_an_unsupported_field_is_neither_damage_nor_health(self, nvml_here: StandIn, look: Look) -> None:
        nvml_here.set({"field.230": None, "field_err.230": 3, "rows": None, "ecc_volatile": None})
        assert [look() for _ in range(5)] == [[]] * 5
        nvml_here.set({"field_err.230": None, "field.230": 2})
        # It was read as "none" before the field went away: an action now is new, not how the run began.
        assert error_of(look()).details["action"] == "reboot_node"

    def test_7_a_field_that_was_never_supported_hides_no_other_fault(self, nvml_here: StandIn) -> None:
        nvml_here.set({"field.230": None, "field_err.230": 3})
        (look,) = _looking()
        nvml_here.set(ecc_volatile=1)
        assert error_of(look()).code == "RUNTIME_GPU_ERROR"

    def test_8_a_lost_gpu_needs_a_reboot(self, nvml_here: StandIn, look: Look) -> None:
        nvml_here.set({"gpu0.err": 15})
        decisions = look()
        error = error_of(decisions)
        assert (error.code, error.details["condition"]) == ("RUNTIME_GPU_ERROR", "lost")
        assert error.details["action"] == "reboot_node"
        assert isinstance(decisions[-1], Abort)
        assert not decisions[-1].save_first

    def test_9_a_stall_is_told_in_time_and_ends_a_run_that_may_not_be_blind(self, machine: StandIn) -> None:
        script = str(machine.script)
        answer = machine.run(
            f"""
            from trainwarden.guards.decisions import Abort
            from trainwarden.guards.hardware import HardwareGuard, HardwarePolicies
            from trainwarden.guards.sight import SightPolicy

            guard = HardwareGuard(HardwarePolicies(sight=SightPolicy(on_unreadable="abort", grace_s=0.5)))
            s = Sampler(period_s=0.05, deadline_s=0.5).start()
            healthy = until(lambda: isinstance(s.latest(), Sample) and s.latest().sequence and s.latest())
            assert guard.observe(healthy, step=1) == []
            with open({script!r}, "a") as script:
                script.write("sleep_ms.nvmlDeviceGetPowerUsage={HOUR_MS}\\n")
            until(lambda: getattr(s.latest(), "call", None) == "nvmlDeviceGetPowerUsage")
            told, end = guard.observe(s.latest(), step=1), []
            until(lambda: end.extend(guard.observe(s.latest(), step=1)) or end)
            stalled = inside(s._worker.thread, "nvmlDeviceGetPowerUsage")
            s.close(0.05)
            say({{"told": [str(each.event) for each in told], "stalled": stalled,
                 "end": [each.error.code for each in end if isinstance(each, Abort)]}})
            """
        )
        [told] = answer["told"]
        assert "nvmlDeviceGetPowerUsage has not returned" in told
        assert answer["end"] == ["RUNTIME_GPU_MONITORING_FAILED"]
        assert answer["stalled"], "no boundary has waited for the driver"


def test_an_xid_reaches_the_guard_with_its_device(machine: StandIn) -> None:
    machine.set(devices=2)
    script = str(machine.script)
    answer = machine.run(
        f"""
        from trainwarden.guards.hardware import HardwareGuard

        guard = HardwareGuard()
        s = Sampler(period_s=0.02).start()
        until(lambda: s.latest().sequence)
        assert guard.observe(s.latest(), step=1) == []
        with open({script!r}, "a") as script:
            script.write("xids=43:1,79:1\\n")
        told = until(lambda: guard.observe(s.latest(), step=1))
        while len(told) < 3:
            told += guard.observe(s.latest(), step=1)
        say([str(told[0].event), told[-1].error.code, told[-1].error.details["device"], told[-1].error.details["xid"]])
        """
    )
    recorded = "Xid 43: GPU stopped processing (channel reset) on GPU 1: recorded, nothing to do"
    assert answer == [recorded, "RUNTIME_GPU_ERROR", 1, 79]


def test_the_process_that_took_the_memory_is_asked_of_the_driver_once_and_named(nvml_here: StandIn) -> None:
    seconds = iter(range(1000))
    own = AllocatorMemory(
        allocated_bytes=10 * GIB, reserved_bytes=30 * GIB, peak_allocated_bytes=0, peak_reserved_bytes=0
    )
    guard = HardwareGuard(clock=lambda: float(next(seconds)), allocator=lambda _: own, own_pid=100)
    nvml_here.set(memory_used=31 * GIB, processes=f"100:{31 * GIB}")
    for _ in range(3):
        assert guard.observe(snapshot(), step=5) == []
    nvml_here.set(memory_used=78 * GIB, processes=f"100:{31 * GIB},4242:{47 * GIB}")
    decisions = [decision for _ in range(3) for decision in guard.observe(snapshot(), step=5)]
    (release,) = decisions
    assert isinstance(release, ReleaseCache)
    assert (release.event.foreign_pid, release.event.foreign_bytes) == (4242, 47 * GIB)
    asked = [name for _, name in nvml_here.calls() if name == "nvmlDeviceGetComputeRunningProcesses_v3"]
    assert len(asked) == 2  # the binding asks for the size, then for the list


def test_processes_are_unknown_when_the_driver_takes_its_time(machine: StandIn) -> None:
    machine.set({"sleep_ms.nvmlDeviceGetComputeRunningProcesses_v3": HOUR_MS})
    answer = machine.run(
        """
        from trainwarden.guards.hardware import processes_of

        reading = snapshot().readings[0]
        say(str(processes_of(reading)))
        """
    )
    assert answer == "unknown"


def test_on_a_machine_without_a_driver_the_unknown_is_told_once(machine: StandIn) -> None:
    answer = machine.run(
        """
        from trainwarden.guards.hardware import HardwareGuard

        guard = HardwareGuard()
        with Sampler(period_s=0.01) as s:
            until(lambda: s.latest().sequence)
            say([str(each.event) for _ in range(50) for each in guard.observe(s.latest(), step=0)])
        """,
        LD_LIBRARY_PATH="",
    )
    assert answer == ["the state of the hardware is unknown: no NVIDIA driver here: its NVML library was not found"]


def test_of_a_healthy_machine_nothing_is_told(nvml_here: StandIn, look: Look) -> None:
    assert [look() for _ in range(20)] == [[]] * 20
