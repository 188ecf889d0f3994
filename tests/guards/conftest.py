"""The scripted NVML of the device room, for guards that are tested through the real binding."""

from __future__ import annotations

from tests.device.conftest import machine, nvml_here, nvml_library, old_nvml_here, old_nvml_library

__all__ = ["machine", "nvml_here", "nvml_library", "old_nvml_here", "old_nvml_library"]
