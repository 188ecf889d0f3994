"""What the log lines say of the machine: memory and temperature, each unknown rather than guessed."""

from __future__ import annotations

import sys

import psutil
import torch

from trainwarden.device import Sampler, SensorSilent, known
from trainwarden.runtime.meter import forget_peak_allocated_bytes, peak_allocated_bytes


class Sensors:
    """Readings of the device that trains; ``None`` where there is none.

    On a CPU there is no temperature, and memory is that of the process. ``sampler`` is that of the run's guard, which
    starts and closes it.
    """

    def __init__(self, device: torch.device, sampler: Sampler | None) -> None:
        self._device = device
        self._sampler = sampler
        self._max_temperature_c: float | None = None

    def forget_peak_memory(self) -> None:
        """A GPU's peak is counted from here on."""
        if self._device.type == "cuda":
            forget_peak_allocated_bytes(self._device)

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
            return peak_allocated_bytes(self._device)
        if sys.platform == "win32":
            return None
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
