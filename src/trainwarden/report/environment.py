"""What this machine and this installation offer to a run, each verdict with its reason."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from typing import Any

from trainwarden import device
from trainwarden.capability import ProbeReport
from trainwarden.report import text

PACKAGES = (
    "trainwarden",
    "torch",
    "accelerate",
    "peft",
    "transformers",
    "safetensors",
    "numpy",
    "nvidia-ml-py",
    "psutil",
    "pydantic",
)


def describe(report: ProbeReport) -> dict[str, Any]:
    """Everything at once, JSON-serialisable. Never raises for what it finds; imports no torch.

    Keys: ``python``, ``platform``, ``cpus``, ``memory_bytes``, ``driver``, ``driver_cuda``, ``devices`` (readings of
    `trainwarden.device.Reading.to_dict`), ``devices_note``, ``packages`` (``None``: not installed), and those of
    `ProbeReport.to_dict`.
    """
    found = device.list_devices()
    driver, cuda = device.driver_version(), device.cuda_driver_version()
    return {
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "cpus": device.cpu_count(),
        "memory_bytes": device.host_memory().total_bytes,
        "driver": _said(driver),
        "driver_cuda": _said(cuda),
        "devices": [one.read().to_dict() for one in found.devices],
        "devices_note": found.reason,
        "packages": {name: _version(name) for name in PACKAGES},
        **report.to_dict(),
    }


def _said(value: device.Value[str]) -> str:
    return f"{value} ({value.reason})" if isinstance(value, device.Missing) else value


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def probe_text(found: dict[str, Any], report: ProbeReport) -> str:
    """What ``describe`` made of the report, for a person."""
    machine = [
        ("python", found["python"]),
        ("platform", found["platform"]),
        ("processors", f"{found['cpus']:g}"),
        ("memory", text.size(found["memory_bytes"])),
        ("driver", found["driver"]),
        ("driver's CUDA", found["driver_cuda"]),
    ]
    devices = [_device_row(one) for one in found["devices"]]
    if not devices or found["devices_note"]:
        devices.append(("note" if devices else "none", found["devices_note"]))
    packages = [(name, version or "not installed") for name, version in found["packages"].items()]
    parts = {
        "machine": machine,
        "devices": devices,
        "abilities": report.ability_rows(),
        "amounts": report.quantity_rows(),
        "requirements": report.requirement_rows(),
        "packages": packages,
    }
    return "\n\n".join(f"{title}\n{text.pairs(rows)}" for title, rows in parts.items() if rows)


def _device_row(reading: dict[str, Any]) -> tuple[str, str]:
    memory = reading["memory_total_bytes"]
    heat = reading["temperature_c"]
    facts = [
        reading["name"],
        text.size(memory if isinstance(memory, int) else None),
        text.temperature(heat if isinstance(heat, int | float) else None),
    ]
    return f"cuda:{reading['index']}", ", ".join(facts)
