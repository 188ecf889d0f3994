"""What the hardware guard decides, done: at a step boundary, where the run may wait, save or end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch

from trainwarden.device import Sampler
from trainwarden.events import Event
from trainwarden.guards.decisions import Abort, Pause, ReleaseCache, Shrink
from trainwarden.guards.hardware import HardwareGuard

POLL_S = 1.0
"""How often a paused run looks at its devices: the sampler's own period."""


class HardwareWatch:
    """The sampler and the guard of the devices that a run trains on, between `start` and `close`.

    ``save()`` takes a checkpoint of what is not saved yet, ``shrink()`` asks for smaller micro-batches, ``stopping()``
    tells whether somebody asked the run to stop.
    """

    def __init__(
        self,
        guard: HardwareGuard,
        sampler: Sampler,
        *,
        emit: Callable[[Event], None],
        save: Callable[[], None],
        shrink: Callable[[], None],
        stopping: Callable[[], bool],
    ) -> None:
        self._guard = guard
        self._sampler = sampler
        self._emit = emit
        self._save = save
        self._shrink = shrink
        self._stopping = stopping

    def start(self) -> None:
        self._sampler.start()

    def close(self) -> None:
        """Never waits long: a sampler that hangs in the driver is abandoned."""
        self._sampler.close()

    def attend(self, step: int) -> None:
        """Looks at the newest sample and does what it asks for; returns when the run may go on or is to stop.

        Raises what ends the run: `GPUTemperatureError`, `GPUError`, `GPUMonitoringError`.
        """
        self._look(step)
        while self._guard.paused and not self._stopping():
            time.sleep(POLL_S)
            self._look(step)

    def _look(self, step: int) -> None:
        for decision in self._guard.observe(self._sampler.latest(), step=step):
            if isinstance(decision, Abort):
                if decision.save_first:
                    self._save()
                raise decision.error
            self._emit(decision.event)
            if isinstance(decision, Pause):
                self._save()
            elif isinstance(decision, Shrink):
                self._shrink()
                _release_cache()
            elif isinstance(decision, ReleaseCache):
                _release_cache()


def cuda_indices(tensors: Iterable[torch.Tensor]) -> set[int]:
    """The CUDA devices that hold any of ``tensors``, as torch numbers them."""
    devices = {tensor.device for tensor in tensors}
    return {device.index or 0 for device in devices if device.type == "cuda"}


def _release_cache() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
