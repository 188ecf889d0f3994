"""What is read from the CUDA allocator, scripted: the hardware boundary. `tests/gpu` has the real one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainwarden.runtime import meter as module
from trainwarden.runtime.meter import (
    CudaMeter,
    forget_peak_allocated_bytes,
    meter_of,
    peak_allocated_bytes,
)

GIB = 2**30
DEVICE = torch.device("cuda", 1)


class Cuda:
    """The counters of one device, as `torch.cuda` tells them."""

    def __init__(self, *, total: int, foreign: int, fraction: float = 1.0) -> None:
        self.total, self.foreign, self.fraction = total, foreign, fraction
        self.current = self.peak = self.reserved = 0

    def allocate(self, size_bytes: int) -> None:
        self.current += size_bytes
        self.peak = max(self.peak, self.current)
        self.reserved = max(self.reserved, self.current)

    def memory_stats_as_nested_dict(self, _device: Any) -> Any:
        return {"allocated_bytes": {"all": {"current": self.current, "peak": self.peak}}}

    def reset_peak_memory_stats(self, _device: Any) -> None:
        self.peak = self.current

    def max_memory_allocated(self, _device: Any) -> int:
        return self.peak

    def memory_allocated(self, _device: Any) -> int:
        return self.current

    def memory_reserved(self, _device: Any) -> int:
        return self.reserved

    def mem_get_info(self, _device: Any) -> tuple[int, int]:
        return self.total - self.foreign - self.reserved, self.total

    def get_per_process_memory_fraction(self, _device: Any) -> float:
        return self.fraction


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    scripted = Cuda(total=80 * GIB, foreign=10 * GIB)
    monkeypatch.setattr(module, "torch", SimpleNamespace(cuda=scripted, device=torch.device, Tensor=torch.Tensor))
    monkeypatch.setattr(module, "_highest_bytes", {})
    return scripted


def test_a_peak_is_what_an_attempt_took_beyond_what_was_there(cuda: Cuda) -> None:
    cuda.allocate(20 * GIB)
    meter = CudaMeter(1)
    meter.begin()
    cuda.allocate(7 * GIB)
    cuda.allocate(-7 * GIB)
    assert meter.peak_bytes() == 7 * GIB
    meter.begin()
    cuda.allocate(3 * GIB)
    assert meter.peak_bytes() == 3 * GIB, "not the peak of the attempt before"


def test_the_room_is_what_is_free_and_what_torch_has_cached(cuda: Cuda) -> None:
    cuda.allocate(30 * GIB)
    cuda.allocate(-10 * GIB)
    assert CudaMeter(1).room_bytes() == (80 - 10 - 20) * GIB


def test_the_room_ends_where_the_share_of_this_process_does(cuda: Cuda) -> None:
    cuda.allocate(20 * GIB)
    cuda.fraction = 0.5
    assert CudaMeter(1).room_bytes() == 20 * GIB
    cuda.fraction = 0.1
    assert CudaMeter(1).room_bytes() == 0


def test_resets_do_not_hide_the_highest_peak_of_the_run(cuda: Cuda) -> None:
    cuda.allocate(40 * GIB)
    cuda.allocate(-30 * GIB)
    CudaMeter(1).begin()
    assert cuda.max_memory_allocated(1) == 10 * GIB
    assert peak_allocated_bytes(DEVICE) == 40 * GIB
    forget_peak_allocated_bytes(DEVICE)
    assert peak_allocated_bytes(DEVICE) == 10 * GIB


def leaf(device: str) -> Any:
    return SimpleNamespace(device=torch.device(device))


@pytest.mark.parametrize(
    "devices", [[], ["cpu"], ["cpu", "cuda:0"], ["cuda:0", "cuda:1"], ["meta"]], ids=lambda d: "+".join(d) or "none"
)
def test_where_there_is_not_one_cuda_device_there_is_no_meter(devices: list[str]) -> None:
    assert meter_of(leaf(device) for device in devices) is None


def test_the_meter_is_that_of_the_device_that_trains() -> None:
    meter = meter_of([leaf("cuda:1"), leaf("cuda:1")])
    assert isinstance(meter, CudaMeter)
    assert meter._index == 1
