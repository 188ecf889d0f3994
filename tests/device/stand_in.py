"""The scripted NVML: compiles `nvml_stub.c`, writes its script, runs programs against it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from tests.waiting import LIMIT_S

SOURCE = Path(__file__).with_name("nvml_stub.c")
GIB = 2**30

HEALTHY: dict[str, object] = {
    "temperature": 60,
    "margin": 27,
    "field.194": -2,
    "field_type.194": 5,
    "gpu_max": 87,
    "slowdown": 89,
    "shutdown": 92,
    "reasons": 0,
    "memory_total": 80 * GIB,
    "memory_used": 40 * GIB,
    "memory_reserved": 1 * GIB,
    "power_mw": 400_000,
    "power_limit_mw": 700_000,
    "utilization": 98,
    "ecc_volatile": 0,
    "ecc_aggregate": 0,
    "rows": "0,0,0,0",
    "field.230": 0,
    "pcie_replays": 0,
    "field.38": 0,
    "mig": 0,
}
"""A data-centre GPU in good health."""


def compiler() -> str | None:
    return next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)


def compile_stub(folder: Path, *flags: str) -> Path:
    """The shared library, under the name that the binding loads."""
    library = folder / "libnvidia-ml.so.1"
    folder.mkdir(parents=True, exist_ok=True)
    soname = "-Wl,-soname,libnvidia-ml.so.1"
    command = [compiler() or "cc", *flags, "-shared", "-fPIC", "-O1", soname, "-o", str(library), str(SOURCE)]
    subprocess.run(command, check=True, capture_output=True, timeout=LIMIT_S)
    return library


class StandIn:
    """One scripted machine: what its NVML says now, and what was asked of it."""

    def __init__(self, library: Path, folder: Path) -> None:
        self.library = library
        self.script = folder / "nvml.script"
        self._log = folder / "nvml.log"
        self._keys: dict[str, object] = {}
        self.set(devices=1, **HEALTHY)

    def set(self, keys: dict[str, object] | None = None, /, **more: object) -> None:
        """Change keys of the script (see `nvml_stub.c`); None removes one, as on a device without it."""
        self._keys.update({**(keys or {}), **more})
        lines = [f"{key}={value}" for key, value in self._keys.items() if value is not None]
        # Renamed into place: the library reads the file at any moment.
        draft = self.script.with_suffix(".draft")
        draft.write_text("\n".join(lines) + "\n")
        draft.replace(self.script)

    def keys(self) -> frozenset[str]:
        return frozenset(self._keys)

    @property
    def environment(self) -> dict[str, str]:
        return {"NVML_STUB_SCRIPT": str(self.script), "NVML_STUB_LOG": str(self._log)}

    def calls(self) -> list[tuple[int, str]]:
        """(process id, function) of every call so far."""
        if not self._log.exists():
            return []
        return [(int(pid), name) for pid, name in (line.split() for line in self._log.read_text().splitlines())]

    def run(self, program: str, *, timeout_s: float = LIMIT_S, **environ: str) -> Any:
        """What a Python program prints as JSON, run in a fresh process whose driver this machine is."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA_", "NVML_STUB"))}
        variables = {"LD_LIBRARY_PATH": str(self.library.parent), **self.environment, **environ}
        process = subprocess.run(
            [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PRELUDE + textwrap.dedent(program)],
            env={**inherited, **variables},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert process.returncode == 0, process.stderr
        assert process.stderr == ""
        return json.loads(process.stdout)


PRELUDE = """
import json, os, sys, threading, time
from trainwarden.device import *
from trainwarden.device.binding import call_in_flight

def say(value):
    print(json.dumps(value), flush=True)

def until(condition):
    end = time.monotonic() + 300
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)
    return found

def inside(thread, call):
    # Whether the thread is inside this call of the driver.
    return (call_in_flight(thread.ident or 0) or ("",))[0] == call
"""

HOUR_MS = 3_600_000
"""How long a driver stalls that never comes back: whoever waits for it is ended by the limit of `StandIn.run`."""
