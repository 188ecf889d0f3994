"""The guard on a CUDA device: real out-of-memory errors, steps without synchronisation, resume. Skipped without one.

Needs neither pydantic nor torchao. Memory is limited for this process by the caching allocator alone; the card's
settings stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from trainwarden import Guard
from trainwarden.errors import GPUMemoryError
from trainwarden.events import EvaluationShrunk, MicroBatchShrunk, OptimizerStepFinished
from trainwarden.guards.spikes import SpikePolicy
from trainwarden.runtime.optimizer_step import OptimizerStep
from trainwarden.testing import FailingAllocation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WIDTH = 512


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def deep_model() -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(6)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 1)).cuda()


def allow_gib(gib: float) -> None:
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / total)


def train(run_dir: Path, rows: int, *, steps: int = 6, gib: float | None = None, **options: Any) -> Any:
    events: list[Any] = []
    model = deep_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    data = [torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(i)).cuda() for i in range(3)]
    guard = Guard(run_dir, observers=[events.append], **options)
    with guard.watch(model=model, optimizer=optimizer):
        for batch in guard.batches(data, max_steps=steps):
            if gib is not None and guard.steps_completed == 2:
                allow_gib(gib)
            guard.backward(lambda b: model(b).square().mean(), batch)
            optimizer.step()
            optimizer.zero_grad()
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double().cpu()
    return weights, events, guard


def test_a_real_cuda_out_of_memory_error_is_recovered(tmp_path: Path) -> None:
    rows = 1 << 18  # six layers of 512 MiB activations each, twice
    whole, _, _ = train(tmp_path / "a", rows)
    split, events, guard = train(tmp_path / "b", rows, gib=4.0)
    assert any(isinstance(event, MicroBatchShrunk) for event in events)
    assert guard.micro_batch_size is not None
    assert guard.micro_batch_size < rows
    assert float((split - whole).norm() / whole.norm()) < 1e-5


def test_when_nothing_fits_the_error_tells_what_the_device_said(tmp_path: Path) -> None:
    with pytest.raises(GPUMemoryError) as caught:
        train(tmp_path, 1 << 18, gib=0.3, max_shrinks=1)
    assert caught.value.details["requested_bytes"]
    assert caught.value.details["free_bytes"] is not None


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("spikes", [None, SpikePolicy()], ids=["plain", "looking for spikes"])
def test_a_fused_step_under_guard_does_not_synchronise(tmp_path: Path, spikes: SpikePolicy | None, clip: bool) -> None:
    model = nn.Linear(64, 1).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    guard = Guard(tmp_path, observers=[], checkpoint_every_s=None, spikes=spikes)
    with guard.watch(model=model, optimizer=optimizer):
        for batch in guard.batches([torch.randn(8, 64).cuda()], max_steps=20):
            mode = "error" if 2 <= guard.steps_completed < 18 else "default"
            torch.cuda.set_sync_debug_mode(mode)
            try:
                guard.backward(lambda b: model(b).square().mean(), batch)
                if clip:
                    guard.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert guard.steps_completed == 20


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_step_never_reaches_the_weights(tmp_path: Path, fused: bool, value: float) -> None:
    model = nn.Linear(64, 1).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    guard = Guard(tmp_path, observers=[])
    with guard.watch(model=model, optimizer=optimizer):
        for batch in guard.batches([torch.randn(8, 64).cuda()], max_steps=5):
            before = model.weight.detach().clone()
            bad = guard.steps_completed == 2
            guard.backward(lambda b, s=value if bad else 1.0: model(b).square().mean() * s, batch)
            optimizer.step()
            optimizer.zero_grad()
            assert torch.equal(before, model.weight) is bad
    assert (guard.steps_completed, guard.steps_skipped) == (5, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_finite_gradients_are_no_alarm(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.zeros(1 << 20, device="cuda", dtype=dtype))
    optimizer = torch.optim.AdamW([weight], lr=1e-6, fused=True)
    model = nn.Module()
    model.register_parameter("weight", weight)
    guard = Guard(tmp_path, observers=[])
    large = torch.finfo(dtype).max / 2
    with guard.watch(model=model, optimizer=optimizer):
        for _ in guard.batches([torch.ones(1)], max_steps=2):
            weight.grad = torch.full_like(weight, large)
            optimizer.step()
    assert guard.steps_skipped == 0


def test_a_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    def run(run_dir: Path, stop: int | None) -> torch.Tensor:
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.3), nn.Linear(64, 1)).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        guard = Guard(run_dir, observers=[], checkpoint_every_steps=1)
        with guard.watch(model=model, optimizer=optimizer):
            for batch in guard.batches([torch.ones(8, 64, device="cuda")], max_steps=8):
                if guard.steps_completed == stop:
                    raise InterruptedError
                guard.backward(lambda b: functional.mse_loss(model(b), b[:, :1]), batch)
                optimizer.step()
                optimizer.zero_grad()
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).cpu()

    whole = run(tmp_path / "a", None)
    with pytest.raises(InterruptedError):
        run(tmp_path / "b", 4)
    assert torch.equal(run(tmp_path / "b", None), whole)


# -- the optimizer's step ----------------------------------------------------------------------------------------


LAYERS, LAYER_WIDTH = 8, 2048  # 16 MiB each in float32


def optimise(run_dir: Path, how: str, *, at_step: int = -1, spare_mib: float = 0.0) -> tuple[torch.Tensor, list[Any]]:
    """Three steps of AdamW; in one of them only ``spare_mib`` beyond what is in use may be allocated."""
    events: list[Any] = []
    torch.manual_seed(2)
    model = nn.ModuleList(nn.Linear(LAYER_WIDTH, LAYER_WIDTH, bias=False) for _ in range(LAYERS)).cuda()
    options = {"fused": {"fused": True}, "foreach": {"foreach": True}, "for-loop": {"foreach": False}}[how]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
    guard = Guard(run_dir, observers=[events.append], checkpoint_every_s=None)
    with guard.watch(model=model, optimizer=optimizer):
        for batch in guard.batches([torch.ones(2, LAYER_WIDTH).cuda()], max_steps=3):
            guard.backward(lambda b: sum(layer(b).square().mean() for layer in model), batch)
            if guard.steps_completed == at_step:
                torch.cuda.empty_cache()
                allow_gib(torch.cuda.memory_reserved() / 2**30 + spare_mib / 1024)
            optimizer.step()
            torch.cuda.set_per_process_memory_fraction(1.0)
            optimizer.zero_grad()
    counted = {float(state["step"]) for state in optimizer.state.values()}
    assert counted == {3.0}, "every parameter has taken every step once"
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).cpu(), events


@pytest.mark.parametrize(
    ("how", "at_step", "spare_mib"),
    [
        ("foreach", 0, LAYERS * 32 + 40),  # all states and two temporaries; all temporaries would take 128 MiB
        ("for-loop", 0, LAYERS * 32 + 80),
        ("foreach", 1, 40),
    ],
)
def test_an_optimizer_step_that_runs_out_of_memory_is_finished_bit_for_bit(
    tmp_path: Path, how: str, at_step: int, spare_mib: float
) -> None:
    whole, _ = optimise(tmp_path / "a", how)
    finished, events = optimise(tmp_path / "b", how, at_step=at_step, spare_mib=spare_mib)
    assert torch.equal(finished, whole)
    assert how == "for-loop" or any(isinstance(event, OptimizerStepFinished) for event in events)


@pytest.mark.parametrize("how", ["foreach", "fused", "for-loop"])
def test_a_step_under_guard_is_torchs_own_at_whichever_allocation_it_fails(tmp_path: Path, how: str) -> None:
    whole, _ = optimise(tmp_path / "a", how)
    options = {"fused": {"fused": True}, "foreach": {"foreach": True}, "for-loop": {"foreach": False}}[how]
    for at in (1, 3, 9, 20):
        torch.manual_seed(2)
        model = nn.ModuleList(nn.Linear(LAYER_WIDTH, LAYER_WIDTH, bias=False) for _ in range(LAYERS)).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
        step = OptimizerStep(optimizer, optimizer.step, recover=True, on_finished=lambda *_: None)
        for index in range(3):
            sum(layer(torch.ones(2, LAYER_WIDTH).cuda()).square().mean() for layer in model).backward()
            with FailingAllocation(at if index in (0, 2) else None):
                step.run()
            optimizer.zero_grad()
        assert torch.equal(torch.cat([p.detach().reshape(-1) for p in model.parameters()]).cpu(), whole)


def test_a_memory_error_tells_what_is_free_and_reserved(tmp_path: Path) -> None:
    guard = Guard(tmp_path, observers=[])
    held = torch.empty(2**20, device="cuda")
    total = torch.cuda.get_device_properties(0).total_memory
    with pytest.raises(GPUMemoryError) as caught:
        guard.attempt("load", lambda: torch.empty(2 * total, dtype=torch.uint8, device="cuda"))
    details = caught.value.details
    assert details["phase"] == "load"
    assert details["requested_bytes"] == pytest.approx(2 * total, rel=0.01)
    assert details["free_bytes"] is not None
    assert details["reserved_bytes"] >= held.nbytes
    assert details["would_fit"]


def test_evaluation_shrinks_on_a_real_lack_of_memory(tmp_path: Path) -> None:
    model, events = deep_model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = Guard(tmp_path, observers=[events.append])
    rows = torch.randn(1 << 18, WIDTH, generator=torch.Generator().manual_seed(0)).cuda()
    with guard.watch(model=model, optimizer=optimizer):
        whole = guard.evaluate(lambda b: model(b).square().mean(), [rows])
        allow_gib(torch.cuda.memory_allocated() / 2**30 + 0.4)
        in_parts = guard.evaluate(lambda b: model(b).square().mean(), [rows])
    assert in_parts == pytest.approx(whole, rel=1e-5)
    assert any(isinstance(event, EvaluationShrunk) for event in events)
