"""Reads every device about once a second on its own thread, so that a driver that hangs cannot hold a step.

The consumer never asks the driver. It takes the latest `Sample`, and judges the silence by its own clock:
once the sample is older than period + deadline it gets a `SensorSilent`. That is a signal in itself: a GPU
that falls off the bus often shows nothing else. Silence may also pass: the next sample ends it.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

from .binding import call_in_flight
from .deadline import answer_of
from .discovery import DEADLINE_S, DeviceList, discover
from .nvml import NvmlDevice
from .reading import Device, Reading, unreadable
from .values import Unknown, Unsupported
from .xid import Xid
from .xid_watch import XidWatch

PERIOD_S = 1.0
_XIDS_KEPT = 256


@dataclass(frozen=True, kw_only=True)
class Sample:
    """All devices at about one moment."""

    readings: tuple[Reading, ...] = ()
    """One per visible device, in torch's order."""
    reason: str = ""
    """Why there is no reading, or what is doubtful about the list; empty when there is nothing to say."""
    taken_at_s: float
    """Monotonic clock, when the last of the readings was complete."""
    sequence: int = 0
    """Counts the samples of this process from 1; 0 means that none was taken yet."""
    xids: tuple[Xid, ...] = ()
    """Xids since the sampler began, oldest first (the last 256): tell new ones by `Xid.sequence`."""
    xids_unwatched: Mapping[str, Unsupported | Unknown] = field(default_factory=dict)
    """UUIDs of the devices of which no Xid can be heard, with the reason."""


@dataclass(frozen=True, slots=True)
class SensorSilent:
    """No sample for longer than period + deadline."""

    silent_s: float
    """Age of the last sample."""
    call: str | None
    """The driver call that has not returned, when there is one."""
    last: Sample
    """For display only: it says nothing about now."""

    def __str__(self) -> str:
        cause = f": {self.call} has not returned" if self.call else ""
        return f"no reading for {self.silent_s:.1f} s{cause}"


class Source(Protocol):
    """Where a sampler finds devices and Xids. All methods are called on the sampler's thread only."""

    def open(self) -> DeviceList:
        """The devices, once in each process."""

    def drain_xids(self) -> Sequence[tuple[int, str | None]]:
        """(Xid, UUID of the device or None) since the last call."""

    def unwatched(self) -> Mapping[str, Unsupported | Unknown]:
        """Devices of which no Xid can be heard, by UUID."""


class NvmlSource:
    """The real thing: this process's devices by NVML."""

    def __init__(self) -> None:
        self._watch = XidWatch(())
        self._device_of: dict[str, str] = {}

    def open(self) -> DeviceList:
        found = discover()
        # Xids belong to cards; a MIG part is told of its card's.
        self._device_of = {each.gpu_uuid: each.uuid for each in found.devices if isinstance(each, NvmlDevice)}
        self._watch = XidWatch(tuple(self._device_of))
        self._watch.listen()
        return found

    def drain_xids(self) -> Sequence[tuple[int, str | None]]:
        return [(code, card and self._device_of.get(card)) for code, card in self._watch.drain()]

    def unwatched(self) -> Mapping[str, Unsupported | Unknown]:
        return {self._device_of[card]: missing for card, missing in self._watch.unwatched.items()}


def snapshot(source: Source | None = None, *, deadline_s: float = DEADLINE_S) -> Sample | SensorSilent:
    """One sample now, for a tool that wants no thread running on; waits for at most ``deadline_s``."""
    worker = _Worker(source if source is not None else NvmlSource(), deadline_s, time.monotonic)
    worker.begin()
    worker.sampled.wait(deadline_s)
    worker.stop.set()
    return worker.sample if worker.sampled.is_set() else worker.silence(time.monotonic())


class Sampler:
    """Samples a source in the background, as a context manager or between `start` and `close`.

    ``deadline_s`` is how long one round of readings may take before silence is reported. After a fork, the
    child's first `latest` starts a thread, and an NVML, of its own. No exception leaves it.
    """

    def __init__(
        self,
        source: Source | None = None,
        *,
        period_s: float = PERIOD_S,
        deadline_s: float = DEADLINE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source if source is not None else NvmlSource()
        self._period_s = period_s
        self._deadline_s = deadline_s
        self._clock = clock
        self._worker: _Worker | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> Self:
        """Begin to sample; the first sample comes within a second or so, `latest` says so until then."""
        if self._worker is None:
            self._worker = self._begin()
        return self

    def latest(self) -> Sample | SensorSilent:
        """The newest sample, or the silence. Costs microseconds and never waits."""
        worker = self._worker
        if worker is None:
            return Sample(reason="the sampler is not running", taken_at_s=self._clock())
        if worker.pid != os.getpid():
            worker = self._worker = self._begin()
        sample = worker.sample
        now_s = self._clock()
        if worker.finished or now_s - sample.taken_at_s <= self._period_s + self._deadline_s:
            return sample
        return worker.silence(now_s)

    def close(self, timeout_s: float = 0.5) -> bool:
        """Stop. True when the thread has ended; False when it hangs in the driver and was abandoned."""
        worker, self._worker = self._worker, None
        if worker is None or worker.pid != os.getpid():
            return True
        worker.stop.set()
        worker.thread.join(timeout_s)
        return not worker.thread.is_alive()

    def _begin(self) -> _Worker:
        worker = _Worker(self._source, self._period_s, self._clock)
        # A sampler that was dropped without `close` must not sample for ever.
        weakref.finalize(self, worker.stop.set)
        worker.begin()
        return worker


class _Worker:
    """The sampling thread of one process. It knows nothing of the `Sampler`, which may be garbage."""

    def __init__(self, source: Source, period_s: float, clock: Callable[[], float]) -> None:
        self.pid = os.getpid()
        self.stop = threading.Event()
        self.sampled = threading.Event()
        self.finished = False
        self.sample = Sample(reason="no sample was taken yet", taken_at_s=clock())
        self.thread = threading.Thread(target=self._run, name="trainwarden-sampler", daemon=True)
        self._source = source
        self._period_s = period_s
        self._clock = clock
        self._xids: deque[Xid] = deque(maxlen=_XIDS_KEPT)
        self._xid_count = 0
        self._devices = DeviceList((), "")

    def begin(self) -> None:
        try:
            self.thread.start()
        except RuntimeError as error:
            self.sample = Sample(reason=f"no thread to sample on: {error}", taken_at_s=self._clock())
            self.finished = True
            self.sampled.set()

    def silence(self, now_s: float) -> SensorSilent:
        call = call_in_flight(self.thread.ident or 0)
        sample = self.sample
        return SensorSilent(now_s - sample.taken_at_s, call[0] if call else None, sample)

    def _run(self) -> None:
        self._devices = self._open()
        while not self.stop.is_set():
            self.sample = self._take()
            self.sampled.set()
            if not self._devices.devices:
                break
            self.stop.wait(self._period_s)
        self.finished = True

    def _open(self) -> DeviceList:
        found = answer_of(self._source.open)
        if isinstance(found, Unknown):
            return DeviceList((), f"the devices cannot be listed: {found.reason}")
        return found

    def _take(self) -> Sample:
        devices, reason = self._devices.devices, self._devices.reason
        readings = tuple(self._read(device) for device in devices)
        unwatched = answer_of(self._hear) if devices else {}
        if isinstance(unwatched, Unknown):
            unwatched = dict.fromkeys((device.uuid for device in devices), unwatched)
        return Sample(
            readings=readings,
            reason=reason,
            taken_at_s=self._clock(),
            sequence=self.sample.sequence + 1,
            xids=tuple(self._xids),
            xids_unwatched=unwatched,
        )

    def _read(self, device: Device) -> Reading:
        reading = answer_of(device.read)
        if isinstance(reading, Unknown):
            return unreadable(device.index, device.uuid, device.name, reading, self._clock())
        return reading

    def _hear(self) -> dict[str, Unsupported | Unknown]:
        self._note_xids(self._source.drain_xids())
        return dict(self._source.unwatched())

    def _note_xids(self, events: Sequence[tuple[int, str | None]]) -> None:
        indices = {device.uuid: device.index for device in self._devices.devices}
        for code, uuid in events:
            self._xid_count += 1
            index = None if uuid is None else indices.get(uuid)
            self._xids.append(Xid(self._xid_count, code, index, uuid, self._clock()))
