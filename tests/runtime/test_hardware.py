"""Heat, memory pressure and damage, as a run meets them at its step boundaries. The devices are scripted."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.runtime.loops import Loop, Rows
from trainwarden import Guard
from trainwarden.device import AllocatorMemory, Sample, Sampler, SensorSilent, Unknown
from trainwarden.device.reading import RecoveryAction
from trainwarden.errors import GPUError, GPUMonitoringError, GPUTemperatureError, TrainingAbortedError
from trainwarden.events import CheckpointSaved, Event, MemoryPressure, MicroBatchShrunk, ThermalPause, ThermalResume
from trainwarden.guards.hardware import HardwareGuard, HardwarePolicies
from trainwarden.guards.sight import SightPolicy
from trainwarden.guards.thermal import ThermalPolicy
from trainwarden.testing import healthy_reading

COOL: dict[str, Any] = {"headroom_c": 27.0}
HOT: dict[str, Any] = {"headroom_c": 1.0}
FULL: dict[str, Any] = {"memory_used_bytes": 79 * 2**30}


class ScriptedSampler(Sampler):
    """One new sample each time somebody looks, as far as the script goes; then the last one for ever."""

    def __init__(self, script: list[dict[str, Any] | SensorSilent], clock: Callable[[], float]) -> None:
        super().__init__()
        self.script = script
        self.clock = clock
        self.looked = 0
        self.running = False

    def start(self) -> ScriptedSampler:  # type: ignore[override]
        self.running = True
        return self

    def close(self, timeout_s: float = 0.5) -> bool:
        self.running = False
        return True

    def latest(self) -> Sample | SensorSilent:
        changes = self.script[min(self.looked, len(self.script) - 1)]
        self.looked += 1
        if isinstance(changes, SensorSilent):
            return changes
        now_s = self.clock()
        reading = healthy_reading(taken_at_s=now_s, **changes)
        return Sample(readings=(reading,), taken_at_s=now_s, sequence=self.looked)


class Clock:
    """Five seconds pass with each look at it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 5.0
        return self.now_s


@pytest.fixture(autouse=True)
def scripted_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting while paused; our allocator holds 38 GiB of the device, and NVML does not say who has the rest."""
    ours = AllocatorMemory(30 * 2**30, 38 * 2**30, 38 * 2**30, 38 * 2**30)
    scripted = partial(HardwareGuard, allocator=lambda _: ours, processes=lambda _: Unknown("no permission"))
    monkeypatch.setattr("trainwarden.runtime.hardware.POLL_S", 0.0)
    monkeypatch.setattr("trainwarden.runtime.session.HardwareGuard", scripted)


def guarded(run_dir: Path, script: list[Any], **options: Any) -> Loop:
    clock = Clock()
    policies = options.pop("policies", HardwarePolicies(thermal=ThermalPolicy(min_pause_s=0.0)))
    sampler = ScriptedSampler(script, clock)
    guard_options = {"sampler": sampler, "hardware": policies, "clock": clock, "checkpoint_every_s": None}
    loader = DataLoader(Rows(40, noise=True), batch_size=8, shuffle=True)
    return Loop(run_dir, loader=loader, dropout=0.2, guard_options={**guard_options, **options}, max_steps=10)


def test_a_hot_device_pauses_the_run_after_a_checkpoint_and_leaves_it_bit_identical(tmp_path: Path) -> None:
    undisturbed = guarded(tmp_path / "a", [COOL]).run()
    loop = guarded(tmp_path / "b", [COOL] * 3 + [HOT] * 4 + [COOL] * 50).run()
    order = [type(e) for e in loop.events if isinstance(e, (ThermalPause, CheckpointSaved, ThermalResume))]
    assert order == [ThermalPause, CheckpointSaved, ThermalResume, CheckpointSaved]
    assert loop.named(ThermalPause)[0].step == loop.named(ThermalResume)[0].step
    assert torch.equal(loop.weights(), undisturbed.weights())


def test_a_single_hot_sample_pauses_nothing(tmp_path: Path) -> None:
    loop = guarded(tmp_path, [COOL, COOL, HOT] + [COOL] * 50).run()
    assert not loop.named(ThermalPause)


def test_a_device_that_does_not_cool_ends_the_run_resumable(tmp_path: Path) -> None:
    loop = guarded(tmp_path, [COOL] * 2 + [HOT] * 500)
    with pytest.raises(GPUTemperatureError) as caught:
        loop.run()
    assert caught.value.exit_code == 82
    assert caught.value.retry == "after_cooldown"
    assert caught.value.steps_completed == loop.guard.steps_completed
    assert caught.value.checkpoint_path is not None
    resumed = guarded(tmp_path, [COOL]).run()
    whole = guarded(tmp_path / "whole", [COOL]).run()
    assert torch.equal(resumed.weights(), whole.weights())


def test_a_stop_request_during_a_pause_is_served(tmp_path: Path) -> None:
    loop = guarded(tmp_path, [COOL] * 2 + [HOT] * 500)
    seen: list[Event] = []

    def interrupt(event: Event) -> None:
        seen.append(event)
        if isinstance(event, ThermalPause):
            os.kill(os.getpid(), signal.SIGTERM)

    loop.guard._observers = (interrupt,)
    with pytest.raises(TrainingAbortedError) as caught:
        loop.run()
    assert caught.value.steps_completed == next(e.step for e in seen if isinstance(e, ThermalPause))


def test_memory_that_others_take_shrinks_the_micro_batch_before_it_runs_out(tmp_path: Path) -> None:
    undisturbed = guarded(tmp_path / "a", [COOL]).run()
    loop = guarded(tmp_path / "b", [COOL] * 2 + [FULL] * 500).run()
    assert loop.named(MemoryPressure), "the pressure is told"
    (shrink,) = loop.named(MicroBatchShrunk)[:1]
    assert "nearly full" in shrink.reason
    assert (shrink.from_size, shrink.to_size) == (8, 4)
    assert loop.guard.steps_completed == undisturbed.guard.steps_completed
    assert loop.learning_rates == undisturbed.learning_rates


def test_a_loss_that_must_not_be_split_is_left_whole_while_nothing_has_failed(tmp_path: Path) -> None:
    loop = guarded(tmp_path, [COOL] * 2 + [FULL] * 500)
    loop.disturb = lambda compute_loss, guard: lambda batch: compute_loss(batch) * len(batch[0])
    loop.run()
    assert loop.guard.steps_completed == 10
    assert loop.guard.micro_batch_size is None


def test_a_device_that_asks_for_a_reset_ends_the_run_with_what_to_do(tmp_path: Path) -> None:
    loop = guarded(tmp_path, [COOL] * 3 + [{"recovery_action": RecoveryAction.decode(1)}] * 50)
    with pytest.raises(GPUError) as caught:
        loop.run()
    assert caught.value.details["action"] == "reset_gpu"
    assert caught.value.exit_code == 82


def silent(seconds: float) -> SensorSilent:
    return SensorSilent(seconds, "nvmlDeviceGetTemperature", Sample(taken_at_s=0.0))


def test_silence_is_told_and_training_goes_on(tmp_path: Path) -> None:
    loop = guarded(tmp_path, [COOL] * 2 + [silent(30.0)] * 50).run()
    assert loop.guard.steps_completed == 10
    assert any("nvmlDeviceGetTemperature" in str(e) for e in loop.events)


def test_silence_ends_a_run_that_asked_for_it(tmp_path: Path) -> None:
    policies = HardwarePolicies(sight=SightPolicy(on_unreadable="abort"))
    loop = guarded(tmp_path, [COOL] * 2 + [silent(30.0)] * 500, policies=policies)
    with pytest.raises(GPUMonitoringError) as caught:
        loop.run()
    assert caught.value.checkpoint_path is not None


def test_on_the_cpu_nothing_is_sampled_and_nothing_said(tmp_path: Path) -> None:
    events: list[Event] = []
    loop = Loop(tmp_path, max_steps=2)
    loop.guard = Guard(tmp_path, observers=[events.append])
    loop.run()
    assert not [e for e in events if "NVML" in str(e) or "device" in str(e)]


def test_the_sampler_ends_with_the_watch(tmp_path: Path) -> None:
    loop = guarded(tmp_path, [COOL])
    sampler = loop.guard._sampler
    assert isinstance(sampler, ScriptedSampler)
    running: list[bool] = []
    loop.after_step = lambda guard: running.append(sampler.running)
    loop.run()
    assert running == [True] * 10
    assert not sampler.running


def test_hardware_can_be_left_alone(tmp_path: Path) -> None:
    loop = guarded(tmp_path, [HOT] * 50, hardware=None).run()
    assert loop.guard.steps_completed == 10
