"""A machine that says what a test tells it: the boundary of the room, and nothing behind it, is replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainwarden.capability import Machine, Verdict
from trainwarden.capability.children import Errand, Report
from trainwarden.capability.machine import HttpAnswer, TorchBuild
from trainwarden.capability.verdict import supported, unknown
from trainwarden.device import DeviceList, HostMemory, Unsupported, Value
from trainwarden.testing import FakeDevice

GIB = 2**30
H100 = {"index": 0, "name": "NVIDIA H100", "sm": 90, "total_bytes": 79 * GIB}
CUDA_BUILD = TorchBuild("2.13.0+cu126", "12.6")
AMPLE = HostMemory(64 * GIB, 60 * GIB, GIB, "machine")
NO_DRIVER = Unsupported("no NVIDIA driver here")


class ScriptedMachine(Machine):
    """Linux with one healthy H100 and nothing installed but torch, unless told otherwise.

    ``answers`` holds the verdict of each task by its name, others are supported; ``printed`` is that
    of every report. `errands` keeps what was asked.
    """

    def __init__(
        self,
        *,
        answers: Mapping[str, Verdict] | None = None,
        gpus: Sequence[Mapping[str, Any]] = (H100,),
        environ: Mapping[str, str] | None = None,
        system: tuple[str, str] = ("Linux", "x86_64"),
        installed: Sequence[str] = ("torch",),
        build: TorchBuild | None = CUDA_BUILD,
        library_problem: str | None = None,
        devices: DeviceList | None = None,
        driver: Value[str] = "570.86.15",
        driver_cuda: Value[str] = "12.8",
        memory: HostMemory = AMPLE,
        disk: Value[int] = 100 * GIB,
        printed: str = "",
    ) -> None:
        self._answers = {"cuda": supported("works", devices=[dict(gpu) for gpu in gpus]), **(answers or {})}
        self._environ = dict(environ or {})
        self._system = system
        self._installed = frozenset(installed)
        self._build = build
        self._library_problem = library_problem
        self._devices = DeviceList((), "NVML lists none") if devices is None else devices
        self._driver, self._driver_cuda = driver, driver_cuda
        self._memory = memory
        self._disk = disk
        self._printed = printed
        self.errands: list[Errand] = []

    @property
    def environ(self) -> Mapping[str, str]:
        return self._environ

    def system(self) -> tuple[str, str]:
        return self._system

    def installed(self, package: str) -> bool:
        return package in self._installed

    def torch_build(self) -> TorchBuild | None:
        return self._build

    def cuda_library_problem(self) -> str | None:
        return self._library_problem

    def in_process_group(self) -> bool:
        return False

    def run(self, errands: Sequence[Errand], *, deadline_s: float) -> list[Report]:
        self.errands += errands
        return [
            Report({task: self._answers.get(task, supported(f"{task} works")) for task in errand.tasks}, self._printed)
            for errand in errands
        ]

    @property
    def tasks(self) -> set[str]:
        """All that was tried."""
        return {task for errand in self.errands for task in errand.tasks}

    def devices(self) -> DeviceList:
        return self._devices

    def driver_version(self) -> Value[str]:
        return self._driver

    def cuda_driver_version(self) -> Value[str]:
        return self._driver_cuda

    def host_memory(self) -> HostMemory:
        return self._memory

    def disk_free_bytes(self, place: Path) -> Value[int]:
        return self._disk

    def file_exists(self, path: Path) -> bool:
        return False

    def head(self, url: str, *, deadline_s: float) -> HttpAnswer:
        return HttpAnswer(None, problem="no network in this test")

    def get_local(self, host: str, port: int, path: str, *, deadline_s: float) -> HttpAnswer:
        return HttpAnswer(None, problem="Connection refused")


def without_gpu(**changes: Any) -> ScriptedMachine:
    """A CPU build of torch on a machine without driver."""
    settings: dict[str, Any] = {
        "build": TorchBuild("2.13.0+cpu", None),
        "gpus": (),
        "driver": NO_DRIVER,
        "driver_cuda": NO_DRIVER,
    }
    return ScriptedMachine(**{**settings, **changes})


def cards(*sizes_bytes: int) -> DeviceList:
    """Devices as NVML lists them, by their total memory."""
    return DeviceList(tuple(FakeDevice(index, memory_total_bytes=size) for index, size in enumerate(sizes_bytes)), "")


def gpus(*sms: int, total_bytes: int = 79 * GIB) -> list[dict[str, Any]]:
    """Devices as torch sees them, by their compute capability."""
    return [{"index": index, "name": f"GPU {sm}", "sm": sm, "total_bytes": total_bytes} for index, sm in enumerate(sms)]


TAKEN = unknown("could not be tried, the device is taken: CUDA out of memory")
