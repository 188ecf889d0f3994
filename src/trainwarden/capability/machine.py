"""`Machine`: the boundary of this room. All that a probe asks of the world goes through here; tests script it."""

from __future__ import annotations

import ctypes
import http.client
import importlib.util
import os
import platform
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from trainwarden import device
from trainwarden.capability import children
from trainwarden.capability.children import Errand, Report


@dataclass(frozen=True)
class TorchBuild:
    """What the installed torch was built for; ``cuda`` and ``hip`` are None where it was not."""

    version: str
    cuda: str | None
    hip: str | None = None

    @property
    def for_gpus(self) -> bool:
        return self.cuda is not None or self.hip is not None


@dataclass(frozen=True)
class HttpAnswer:
    """An answer of any status, or (``status`` None) why there is none; ``timed_out`` tells silence from refusal."""

    status: int | None
    body: bytes = b""
    problem: str = ""
    timed_out: bool = False


class Machine:
    """This machine and this installation."""

    @property
    def environ(self) -> Mapping[str, str]:
        return os.environ

    def system(self) -> tuple[str, str]:
        """Operating system and processor as Python names them: ``("Darwin", "arm64")``."""
        return platform.system(), platform.machine()

    def installed(self, package: str) -> bool:
        """Whether the import system finds it; nothing is imported, so it may still be broken."""
        try:
            return importlib.util.find_spec(package) is not None
        except (ImportError, ValueError):  # ValueError: a stand-in in sys.modules without a spec
            return package in sys.modules

    def torch_build(self) -> TorchBuild | None:
        """Read from torch's own version file, which costs a millisecond where importing torch costs a second."""
        version = getattr(sys.modules.get("torch"), "version", None) or _version_module()
        if version is None:
            return None
        return TorchBuild(str(version.__version__), version.cuda, getattr(version, "hip", None))

    def cuda_library_problem(self) -> str | None:
        """Why the driver's CUDA library cannot be loaded, without which no torch finds a GPU; None: it can be.

        Loading it starts nothing: a process that forks later is not harmed.
        """
        name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
        try:
            ctypes.CDLL(name)
        except OSError as error:
            return str(error)
        return None

    def in_process_group(self) -> bool:
        """Whether this process has joined its ranks already, so that the port of their store is taken."""
        distributed = sys.modules.get("torch.distributed")
        return distributed is not None and distributed.is_available() and bool(distributed.is_initialized())

    def run(self, errands: Sequence[Errand], *, deadline_s: float) -> list[Report]:
        """See `trainwarden.capability.children.run`."""
        return children.run(errands, deadline_s=deadline_s)

    def devices(self) -> device.DeviceList:
        return device.list_devices()

    def driver_version(self) -> device.Value[str]:
        return device.driver_version()

    def cuda_driver_version(self) -> device.Value[str]:
        return device.cuda_driver_version()

    def host_memory(self) -> device.HostMemory:
        return device.host_memory()

    def disk_free_bytes(self, place: Path) -> device.Value[int]:
        return device.disk_free_bytes(place)

    def file_exists(self, path: Path) -> bool:
        return path.is_file()

    def head(self, url: str, *, deadline_s: float) -> HttpAnswer:
        """One HEAD request, through a proxy where the environment names one. Name look-up counts too."""
        return _within(deadline_s, lambda: _head(url, deadline_s))

    def get_local(self, host: str, port: int, path: str, *, deadline_s: float) -> HttpAnswer:
        """One GET request past any proxy, for a daemon on this machine."""
        return _within(deadline_s, lambda: _get(host, port, path, deadline_s))


def _version_module() -> ModuleType | None:
    """``torch/version.py`` by itself, or None where torch is missing or has no such file."""
    try:
        package = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        return None
    for folder in (package.submodule_search_locations or ()) if package else ():
        path = Path(folder, "version.py")
        spec = importlib.util.spec_from_file_location("trainwarden_torch_version", path)
        if spec is None or spec.loader is None or not path.is_file():
            continue
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module if hasattr(module, "cuda") and hasattr(module, "__version__") else None
    return None


def _head(url: str, timeout_s: float) -> HttpAnswer:
    try:
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "trainwarden"})
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return HttpAnswer(int(answer.status))
    except urllib.error.HTTPError as error:
        return HttpAnswer(error.code)  # it answered: reachable
    except urllib.error.URLError as error:
        return _no_answer(error.reason if isinstance(error.reason, Exception) else error)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return _no_answer(error)


def _get(host: str, port: int, path: str, timeout_s: float) -> HttpAnswer:
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return HttpAnswer(answer.status, answer.read(65536))
    except (OSError, http.client.HTTPException) as error:
        return _no_answer(error)
    finally:
        connection.close()


def _no_answer(error: Exception) -> HttpAnswer:
    strerror: Any = getattr(error, "strerror", None)
    return HttpAnswer(None, problem=str(strerror or error), timed_out=isinstance(error, TimeoutError))


def _within(deadline_s: float, ask: Callable[[], HttpAnswer]) -> HttpAnswer:
    """Ask on a thread that is abandoned at the deadline: looking up a name cannot be interrupted."""
    answers: list[HttpAnswer] = []
    thread = threading.Thread(target=lambda: answers.append(ask()), name="trainwarden-ask", daemon=True)
    thread.start()
    thread.join(deadline_s)
    return answers[0] if answers else HttpAnswer(None, problem=f"no answer within {deadline_s:g} s", timed_out=True)
