"""What the log lines say of the machine: memory and temperature, each unknown rather than guessed."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

import psutil
import torch

from trainwarden.device import Sampler, SensorSilent, Source, known


class Sensors:
    """Readings of the device that trains, as a context manager; ``None`` where there is none.

    On a CPU there is no temperature, and memory is that of the process. A GPU is sampled on a thread of its
    own, from ``source`` if given.
    """

    def __init__(self, device: torch.device, source: Source | None = None) -> None:
        self._device = device
        self._sampler = Sampler(source) if device.type == "cuda" else None
        self._max_temperature_c: float | None = None

    def __enter__(self) -> Self:
        if self._sampler is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sampler is not None:
            self._sampler.close()

    @property
    def max_temperature_c(self) -> float | None:
        """The highest temperature that `temperature_c` has returned."""
        return self._max_temperature_c

    def temperature_c(self) -> float | None:
        """The newest reading; ``None`` also when the sensor has fallen silent. Never waits for the driver."""
        sample = None if self._sampler is None else self._sampler.latest()
        if sample is None or isinstance(sample, SensorSilent):
            return None
        for reading in sample.readings:
            if reading.index == (self._device.index or 0):
                value = known(reading.temperature_c)
                if value is not None:
                    self._max_temperature_c = max(value, self._max_temperature_c or value)
                return value
        return None

    def memory_bytes(self) -> int | None:
        """In use now: by tensors on a GPU, resident on a CPU."""
        if self._device.type == "cuda":
            return int(torch.cuda.memory_allocated(self._device))
        return int(psutil.Process().memory_info().rss)

    def peak_memory_bytes(self) -> int | None:
        """The most that was in use: since the training began on a GPU, since the process began on a CPU."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        if sys.platform == "win32":
            return None
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
