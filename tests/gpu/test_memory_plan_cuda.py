"""The memory plan on a CUDA device: peaks without a synchronisation, a long batch foreseen. Skipped without one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainwarden import Guard
from trainwarden.events import MicroBatchShrunk
from trainwarden.runtime.meter import CudaMeter, forget_peak_allocated_bytes, meter_of, peak_allocated_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MIB = 2**20


@pytest.fixture(autouse=True)
def whole_device() -> Iterator[None]:
    torch.cuda.empty_cache()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_a_peak_is_read_without_synchronising() -> None:
    held = torch.ones(MIB, device="cuda")
    meter = meter_of([held])
    assert isinstance(meter, CudaMeter)
    torch.cuda.set_sync_debug_mode("error")
    try:
        meter.begin()
        temporary = torch.ones(4 * MIB, device="cuda")
        del temporary
        assert meter.peak_bytes() == 16 * MIB
        room = meter.room_bytes()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert room is not None
    assert room > 16 * MIB


def test_the_room_is_that_of_this_process_within_its_share() -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2**30 / total)
    before = CudaMeter(0).room_bytes()
    held = torch.ones(64 * MIB, device="cuda")
    after = CudaMeter(0).room_bytes()
    assert before is not None
    assert after is not None
    assert before <= 2**30
    assert before - after >= held.numel() * 4


def test_the_highest_peak_survives_the_meters_resets() -> None:
    device = torch.device("cuda", 0)
    forget_peak_allocated_bytes(device)
    torch.ones(32 * MIB, device="cuda")
    CudaMeter(0).begin()
    assert torch.cuda.max_memory_allocated(0) < 128 * MIB
    assert peak_allocated_bytes(device) >= 128 * MIB


def test_a_long_batch_is_split_before_memory_runs_out(tmp_path: Path) -> None:
    """1 GiB for the process; batches of 64 rows, the last so long that it would need about four."""
    width = 256
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
    model.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    events: list[Any] = []
    guard = Guard(tmp_path, observers=[events.append])
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2**30 / total)
    lengths = [256, 512, 768, 1024, 8192]
    ooms = torch.cuda.memory_stats()["num_ooms"]
    with guard.watch(model=model, optimizer=optimizer):
        for batch in guard.batches([torch.randn(64, length, width) for length in lengths], max_steps=5):
            guard.backward(lambda b: model(b.cuda()).square().mean(), batch)
            optimizer.step()
            optimizer.zero_grad()
    (shrink,) = [event for event in events if isinstance(event, MicroBatchShrunk)]
    assert "would need" in shrink.reason
    assert torch.cuda.memory_stats()["num_ooms"] == ooms
