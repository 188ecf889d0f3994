from __future__ import annotations

from collections.abc import Iterator
from ctypes import CDLL
from pathlib import Path

import pynvml
import pytest

from trainwarden.device import binding

from .stand_in import StandIn, compile_stub, compiler


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in NVML as a driver of today has it."""
    if compiler() is None:
        pytest.skip("no C compiler here to build the stand-in NVML")
    return compile_stub(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="session")
def old_nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in NVML without the symbols that older drivers lack."""
    if compiler() is None:
        pytest.skip("no C compiler here to build the stand-in NVML")
    return compile_stub(tmp_path_factory.mktemp("old-nvml"), "-DOLD_DRIVER")


@pytest.fixture
def machine(nvml_library: Path, tmp_path: Path) -> StandIn:
    """A machine with one healthy GPU, for programs run in processes of their own."""
    return StandIn(nvml_library, tmp_path)


@pytest.fixture
def nvml_here(machine: StandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The same machine seen from this process: the real binding, with the stand-in as its library."""
    yield from _inside(machine, monkeypatch)


@pytest.fixture
def old_nvml_here(old_nvml_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    yield from _inside(StandIn(old_nvml_library, tmp_path), monkeypatch)


def _inside(machine: StandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    for name, value in machine.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(pynvml, "nvmlLib", CDLL(str(machine.library)))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.setattr(binding, "_current", None)
    yield machine
    if binding._current is not None:
        binding._current.call("nvmlShutdown")
