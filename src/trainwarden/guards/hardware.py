"""The guards over one stream of samples: what to do at this step boundary about heat, memory, damage and silence.

Pure but for its clock and two questions that are handed in: what torch's allocator holds, and (once in each time of
memory pressure) which processes use a device. No threads, no waiting.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from trainwarden.device import (
    AllocatorMemory,
    GpuProcess,
    Missing,
    NvmlDevice,
    Reading,
    Sample,
    SensorSilent,
    Value,
    Xid,
    allocator_memory,
    known,
)
from trainwarden.device.deadline import within
from trainwarden.events import DeviceHot, MemoryPressure, Notice, ThermalPause, ThermalResume
from trainwarden.guards.decisions import Abort, Decision, Pause, ReleaseCache, Resume, Shrink, Warn
from trainwarden.guards.health import Checkup, HealthPolicy, HealthState
from trainwarden.guards.sight import Blindness, SightPolicy, SightState
from trainwarden.guards.thermal import UNREAD, Heat, ThermalAction, ThermalPolicy, ThermalState
from trainwarden.guards.vram import Usage, VramPolicy, VramState, alone, largest_foreign
from trainwarden.guards.wording import (
    blindness_of,
    describe_heat,
    health_decisions,
    in_order,
    sight_decisions,
    too_hot,
    unguarded,
)

_PROCESSES_DEADLINE_S = 0.1


@dataclass(frozen=True, kw_only=True)
class HardwarePolicies:
    """One policy for each machine; ``None`` switches it off."""

    thermal: ThermalPolicy | None = field(default_factory=ThermalPolicy)
    vram: VramPolicy | None = field(default_factory=VramPolicy)
    health: HealthPolicy | None = field(default_factory=HealthPolicy)
    sight: SightPolicy = field(default_factory=SightPolicy)


@dataclass
class _Watched:
    """What the machines remember of one device, and its last reading."""

    reading: Reading | None = None
    thermal: ThermalState = field(default_factory=ThermalState)
    vram: VramState = field(default_factory=VramState)
    health: HealthState = field(default_factory=HealthState)
    sight: SightState = field(default_factory=SightState)


def processes_of(reading: Reading) -> Value[tuple[GpuProcess, ...]]:
    """Who uses the device now, by NVML; `Unknown` when the driver does not say within a tenth of a second."""
    device = NvmlDevice(reading.index, reading.uuid, reading.name)
    return within(_PROCESSES_DEADLINE_S, device.processes)


class HardwareGuard:
    """Turns samples into decisions, each sample once, however often it is shown.

    ``devices`` are those that this process trains on, as torch numbers them; by default all visible ones. The samples
    should come from a sampler of this run: every Xid in them counts as new.
    """

    def __init__(
        self,
        policies: HardwarePolicies | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        devices: Collection[int] | None = None,
        allocator: Callable[[int], Value[AllocatorMemory]] = allocator_memory,
        processes: Callable[[Reading], Value[tuple[GpuProcess, ...]]] = processes_of,
        own_pid: int | None = None,
    ) -> None:
        self.policies = policies or HardwarePolicies()
        self._clock = clock
        self._devices = devices
        self._allocator = allocator
        self._processes = processes
        self._own_pid = os.getpid() if own_pid is None else own_pid
        self._watched: dict[int, _Watched] = {}
        self._unplaced = HealthState()
        self._sight = SightState()
        self._shown: tuple[int, float] | None = None
        # While nothing waits for time to pass, a sample that was shown before needs no look at all.
        self._at_ease = False
        self._xids_seen: frozenset[Xid] = frozenset()
        self._unheard: set[str] = set()
        self._paused_at_s: float | None = None

    @property
    def paused(self) -> bool:
        """Whether a `Pause` was decided and no `Resume` yet."""
        return self._paused_at_s is not None

    def observe(self, latest: Sample | SensorSilent, *, step: int) -> list[Decision]:
        """What to do now, given what the sampler has (`Sampler.latest`); ``step`` counts completed steps.

        Cheap when nothing is new. An `Abort` comes last, and then nothing is asked for that trains on.
        """
        if self._at_ease and isinstance(latest, Sample) and self._shown == _identity(latest):
            return []
        now_s = self._clock()
        if isinstance(latest, SensorSilent):
            self._at_ease = False
            found = self._see(latest, (), now_s, step)
            found += self._feel(dict.fromkeys(self._watched, UNREAD), now_s, step, silent=True)
            return in_order(found)
        readings = [each for each in latest.readings if self._ours(each.index)]
        found = self._see(latest, readings, now_s, step)
        heats: dict[int, Heat | None] = dict.fromkeys(self._watched)
        if self._is_new(latest):
            for reading in readings:
                self._watched[reading.index].reading = reading
            heats |= {reading.index: Heat.of(reading) for reading in readings}
            found += self._check(latest, readings, step)
            for reading in readings:
                found += self._weigh(reading, step)
        found += self._feel(heats, now_s, step)
        sights = (self._sight, *(each.sight for each in self._watched.values()))
        self._at_ease = not self.paused and all(sight.since_s is None for sight in sights)
        return in_order(found)

    def _ours(self, index: int) -> bool:
        return self._devices is None or index in self._devices

    def _is_new(self, sample: Sample) -> bool:
        shown, self._shown = self._shown, _identity(sample)
        return sample.sequence > 0 and shown != self._shown

    # -- sight ---------------------------------------------------------------------------------------------------

    def _see(
        self, latest: Sample | SensorSilent, readings: Sequence[Reading], now_s: float, step: int
    ) -> list[Decision]:
        before = self._sight
        blindness = self._blindness(latest, readings)
        self._sight, action = self.policies.sight.step(before, blindness, now_s)
        found = sight_decisions(None, before, blindness, action, now_s, step)
        for reading in readings:
            watched = self._watched.setdefault(reading.index, _Watched())
            before, blindness = watched.sight, blindness_of(reading)
            watched.sight, action = self.policies.sight.step(before, blindness, now_s)
            found += sight_decisions(reading.index, before, blindness, action, now_s, step)
        return found

    def _blindness(self, latest: Sample | SensorSilent, readings: Sequence[Reading]) -> Blindness | None:
        if isinstance(latest, SensorSilent):
            return Blindness(reason=str(latest))
        if latest.sequence == 0:
            return Blindness(reason=latest.reason, tell_after_s=self.policies.sight.grace_s)
        if readings:
            return None
        return Blindness(reason=latest.reason or "none of the devices in use can be seen", final=True)

    # -- damage --------------------------------------------------------------------------------------------------

    def _check(self, sample: Sample, readings: Sequence[Reading], step: int) -> list[Decision]:
        policy = self.policies.health
        if policy is None:
            return []
        xids: dict[int | None, list[Xid]] = {}
        for xid in sample.xids:
            if xid not in self._xids_seen:
                place = sample.readings[0].index if xid.index is None and len(sample.readings) == 1 else xid.index
                xids.setdefault(place, []).append(xid)
        self._xids_seen = frozenset(sample.xids)
        found: list[Decision] = []
        for reading in readings:
            watched = self._watched[reading.index]
            checkup = Checkup.of(reading, xids.get(reading.index, ()))
            watched.health, findings = policy.step(watched.health, checkup)
            found += [decision for each in findings for decision in health_decisions(reading, each, step)]
            found += self._deaf(sample, reading, step)
        if None in xids:
            shared = any(Checkup.of(reading).shared_card for reading in readings)
            checkup = Checkup(xids=tuple(xids[None]), shared_card=shared)
            self._unplaced, findings = policy.step(self._unplaced, checkup)
            found += [decision for each in findings for decision in health_decisions(None, each, step)]
        return found

    def _deaf(self, sample: Sample, reading: Reading, step: int) -> list[Decision]:
        missing = sample.xids_unwatched.get(reading.uuid)
        if missing is None or reading.uuid in self._unheard or blindness_of(reading) is not None:
            return []
        self._unheard.add(reading.uuid)
        return [Warn(Notice(step=step, text=f"Xid errors of GPU {reading.index} cannot be heard: {missing.reason}"))]

    # -- memory --------------------------------------------------------------------------------------------------

    def _weigh(self, reading: Reading, step: int) -> list[Decision]:
        policy = self.policies.vram
        if policy is None or isinstance(reading.memory_used_bytes, Missing):
            return []
        watched = self._watched[reading.index]
        usage = Usage.of(reading, self._allocator(reading.index))
        watched.vram, action = policy.step(watched.vram, usage)
        if action is None or usage is None:
            return []
        processes = self._processes(reading)
        if alone(processes, self._own_pid):
            return []
        foreign = largest_foreign(processes, self._own_pid)
        event = MemoryPressure(
            step=step,
            device=reading.index,
            used_bytes=usage.used_bytes,
            total_bytes=usage.total_bytes,
            foreign_pid=foreign.pid if foreign else None,
            foreign_bytes=known(foreign.used_bytes) if foreign else None,
            action=action,
        )
        return [ReleaseCache(event) if action == "release_cache" else Shrink(event)]

    # -- heat ----------------------------------------------------------------------------------------------------

    def _feel(self, heats: dict[int, Heat | None], now_s: float, step: int, *, silent: bool = False) -> list[Decision]:
        policy = self.policies.thermal
        if policy is None:
            return []
        actions: dict[int, ThermalAction] = {}
        for index, heat in heats.items():
            watched = self._watched[index]
            watched.thermal, action = policy.step(watched.thermal, heat, now_s)
            if action is not None:
                actions[index] = action
        # Only now: whether training goes on depends on all devices together.
        return [
            decision
            for index, action in actions.items()
            for decision in self._heat_decisions(index, action, now_s, step, silent=silent)
        ]

    def _heat_decisions(
        self, index: int, action: ThermalAction, now_s: float, step: int, *, silent: bool
    ) -> list[Decision]:
        reading, paused_at_s = self._watched[index].reading, self._watched[index].thermal.paused_at_s
        assert reading is not None
        assert self.policies.thermal is not None
        text = "no reading of it" if silent else describe_heat(reading)
        degrees, headroom = known(reading.temperature_c), known(reading.headroom_c)
        hot = DeviceHot(step=step, device=index, temperature_c=degrees, headroom_c=headroom, reason=text)
        match action:
            case "abort" | "give_up":
                waited_s = None if action == "abort" or paused_at_s is None else now_s - paused_at_s
                return [Abort(too_hot(reading, text, waited_s, silent=silent), save_first=True)]
            case "pause" if not self.paused:
                self._paused_at_s = now_s
                resume_headroom_c = self.policies.thermal.resume_headroom_c
                event = ThermalPause(
                    step=step,
                    device=index,
                    temperature_c=degrees,
                    headroom_c=headroom,
                    reason=text,
                    resume_headroom_c=resume_headroom_c,
                )
                return [Pause(event)]
            case "pause" | "warn":
                return [Warn(hot)]
            case "resume":
                return self._resume(index, degrees, headroom, now_s, step)
            case "clear":
                return [Warn(Notice(step=step, text=f"GPU {index} has cooled: {text}"))]
            case "blind":
                wholly = silent or blindness_of(reading) is not None
                return [] if wholly else [Warn(Notice(step=step, text=unguarded(reading)))]

    def _resume(
        self, index: int, degrees: float | None, headroom: float | None, now_s: float, step: int
    ) -> list[Decision]:
        if self._paused_at_s is None or any(w.thermal.paused_at_s is not None for w in self._watched.values()):
            return []
        paused_s, self._paused_at_s = now_s - self._paused_at_s, None
        event = ThermalResume(step=step, device=index, temperature_c=degrees, headroom_c=headroom, paused_s=paused_s)
        return [Resume(event)]


def _identity(sample: Sample) -> tuple[int, float]:
    # The time too: the count starts over in a forked process.
    return sample.sequence, sample.taken_at_s
