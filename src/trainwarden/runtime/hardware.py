"""What the hardware guard decides, done: at a step boundary, where the run may wait, save or end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch

from trainwarden.device import Sampler
from trainwarden.events import Event
from trainwarden.guards.decisions import Abort, ReleaseCache, Shrink
from trainwarden.guards.hardware import HardwareGuard
from trainwarden.runtime.ranks import Ranks, Wish

POLL_S = 1.0
"""How often a paused run looks at its devices: the sampler's own period."""


class HardwareWatch:
    """The sampler and the guard of the devices that this process trains on, between `start` and `close`.

    ``shrink()`` asks for smaller micro-batches.
    """

    def __init__(
        self, guard: HardwareGuard, sampler: Sampler, *, emit: Callable[[Event], None], shrink: Callable[[], None]
    ) -> None:
        self._guard = guard
        self._sampler = sampler
        self._emit = emit
        self._shrink = shrink
        self.abort: Abort | None = None
        """Why and how the run has to end, once it has."""

    def start(self) -> None:
        self._sampler.start()

    def close(self) -> None:
        """Never waits long: a sampler that hangs in the driver is abandoned."""
        self._sampler.close()

    @property
    def paused(self) -> bool:
        return self._guard.paused

    @property
    def wants_attention(self) -> bool:
        """Whether the run is to pause or to end."""
        return self._guard.paused or self.abort is not None

    def look(self, step: int) -> None:
        """Shows the newest sample to the guard and does what the rest of the run need not know of."""
        for decision in self._guard.observe(self._sampler.latest(), step=step):
            if isinstance(decision, Abort):
                self.abort = decision
                return
            self._emit(decision.event)
            if isinstance(decision, Shrink):
                self._shrink()
                _release_cache()
            elif isinstance(decision, ReleaseCache):
                _release_cache()


def attend(
    watch: HardwareWatch | None,
    ranks: Ranks,
    *,
    step: int,
    save: Callable[[], None],
    stopping: Callable[[], bool],
) -> None:
    """Saves, then waits with all ranks until no device asks for a pause any more or a stop is asked for.

    Raises what ends the run, on all ranks: `GPUTemperatureError`, `GPUError`, `GPUMonitoringError`.
    """
    while True:
        own = watch.abort if watch else None
        aborts = [abort for abort in ranks.gather(own) if abort is not None]
        if all(abort.save_first for abort in aborts):
            save()
        if aborts:
            raise (own or aborts[0]).error
        wishes = Wish.ATTEND if watch and watch.paused else Wish.NOTHING
        agreed = ranks.vote(wishes | (Wish.STOP if stopping() else Wish.NOTHING))
        if Wish.STOP in agreed or Wish.ATTEND not in agreed:
            return
        time.sleep(POLL_S)
        if watch:
            watch.look(step)


def cuda_indices(tensors: Iterable[torch.Tensor]) -> set[int]:
    """The CUDA devices that hold any of ``tensors``, as torch numbers them."""
    devices = {tensor.device for tensor in tensors}
    return {device.index or 0 for device in devices if device.type == "cuda"}


def _release_cache() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
