"""A non-finite loss or gradient never reaches the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.runtime.loops import ComputeLoss, Loop, Rows, small_model
from trainwarden import Guard
from trainwarden.errors import NaNLossError
from trainwarden.events import Notice, StepSkipped
from trainwarden.guards.finite import Culprit
from trainwarden.runtime.clipping import Clipping
from trainwarden.runtime.gate import OptimizerGate, choose_mode
from trainwarden.runtime.phases import clip_grad_norm
from trainwarden.testing import NonFinite

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def poison(at_steps: set[int], **options: Any) -> Any:
    def disturb(compute_loss: ComputeLoss, guard: Guard) -> ComputeLoss:
        return NonFinite(at_steps, steps_completed=lambda: guard.steps_completed, **options)(compute_loss)

    return disturb


class LeavesOut:
    """Runs the same loop, but leaves out ``optimizer.step()`` at chosen steps: what a skipped step must equal."""

    def __init__(self, make: Callable[[Any], torch.optim.Optimizer], at_steps: set[int]) -> None:
        self.make, self.at_steps = make, at_steps

    def __call__(self, parameters: Any) -> torch.optim.Optimizer:
        optimizer = self.make(parameters)
        original, count = optimizer.step, 0

        def step(optimizer: torch.optim.Optimizer) -> Any:
            nonlocal count
            count += 1
            return None if count in self.at_steps else original()

        optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign, assignment]
        return optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("at_step", [1, 6])
@pytest.mark.parametrize(("what", "value"), [("loss", math.nan), ("gradient", math.inf), ("gradient", -math.inf)])
def test_a_bad_step_equals_a_step_left_out(
    tmp_path: Path, name: str, at_step: int, what: Literal["loss", "gradient"], value: float
) -> None:
    disturbed = Loop(
        tmp_path / "a", make_optimizer=OPTIMIZERS[name], disturb=poison({at_step}, what=what, value=value)
    ).run()
    reference = Loop(tmp_path / "b", make_optimizer=LeavesOut(OPTIMIZERS[name], {at_step})).run()
    assert torch.equal(disturbed.weights(), reference.weights())
    assert disturbed.guard.steps_completed == 10, "a skipped step counts"
    assert disturbed.guard.steps_skipped == 1
    (event,) = disturbed.named(StepSkipped)
    assert (event.step, event.what) == (at_step, what)


def test_the_loss_that_was_nan_is_returned_as_nan(tmp_path: Path) -> None:
    loop = Loop(tmp_path, disturb=poison({4})).run()
    assert [math.isnan(loss) for loss in loop.losses] == [step == 4 for step in range(1, 11)]


def test_a_streak_above_the_limit_ends_the_run_with_a_checkpoint_of_healthy_weights(tmp_path: Path) -> None:
    loop = Loop(tmp_path, disturb=poison({4, 5, 6, 7, 8}), guard_options={"max_skipped_in_a_row": 2})
    with pytest.raises(NaNLossError) as caught:
        loop.run()
    error = caught.value
    assert (error.code, error.exit_code, error.steps_completed) == ("RUNTIME_NAN_LOSS", 80, 6)
    expected = {
        "streak": 3,
        "skipped": 3,
        "what": "loss",
        "limit": "streak",
        "tensor": "loss",
        "kind": "nan",
        "step": 6,
    }
    assert expected.items() <= error.details.items()
    assert (error.details["epoch"], error.details["batch_index"]) == (0, 5)
    assert error.checkpoint_path is not None
    reference = Loop(tmp_path / "b", max_steps=3).run()
    assert torch.equal(loop.weights(), reference.weights())


def test_bad_steps_that_are_not_in_a_row_do_not_end_the_run(tmp_path: Path) -> None:
    loop = Loop(tmp_path, disturb=poison({2, 4, 6, 8}), guard_options={"max_skipped_in_a_row": 1}).run()
    assert (loop.guard.steps_completed, loop.guard.steps_skipped) == (10, 4)


@pytest.mark.parametrize("magnitude", [1e20, 1e37])
def test_large_but_finite_gradients_are_no_alarm(tmp_path: Path, magnitude: float) -> None:
    model = nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-37)
    guard = Guard(tmp_path, observers=[])
    with guard.watch(model=model, optimizer=optimizer):
        for batch in guard.batches([torch.ones(2, 4)], max_steps=1):
            guard.backward(lambda b: model(b).mean() * magnitude, batch)
            optimizer.step()
    assert guard.steps_skipped == 0


def test_half_precision_gradients_above_the_half_precision_norm_are_no_alarm(tmp_path: Path) -> None:
    model = nn.Linear(1000, 100, bias=False).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    guard = Guard(tmp_path, observers=[])
    with guard.watch(model=model, optimizer=optimizer):
        for batch in guard.batches([torch.full((2, 1000), 300.0).half()], max_steps=1):
            guard.backward(lambda b: model(b).float().sum(1).mean(), batch)
            assert not torch.linalg.vector_norm(model.weight.grad).isfinite()
            optimizer.step()
    assert guard.steps_skipped == 0


# -- on the device: the verdict is handed to a fused optimizer as found_inf ----------------------------------------


def device_gate(optimizer: torch.optim.Optimizer, losses: list[torch.Tensor]) -> OptimizerGate:
    gate = OptimizerGate(
        optimizer, take_losses=lambda: losses, on_called=lambda: None, current_step=lambda: 1, mode="device"
    )
    gate.install()
    return gate


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.Adagrad])
def test_a_fused_optimizer_skips_a_bad_step_on_the_device_without_a_trace(kind: Any) -> None:
    model = small_model()
    optimizer = kind(model.parameters(), lr=1e-2, fused=True)
    gate = device_gate(optimizer, [])
    for bad in (False, True):
        model(torch.ones(2, 6)).sum().backward()
        if bad:
            model[0].weight.grad[0, 0] = math.inf
        before = [p.clone() for p in model.parameters()]
        counts = [state["step"].clone() for state in optimizer.state.values()]
        optimizer.step()
        changed = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
        assert any(changed) is not bad
        if bad:
            assert [state["step"] for state in optimizer.state.values()] == counts
        optimizer.zero_grad()
    assert [findings.what for _, findings in gate.poll(wait=True)] == [None, "gradient"]
    assert not hasattr(optimizer, "found_inf"), "what was set is taken back"


def test_the_verdict_of_a_grad_scaler_is_merged_and_left_to_it() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], fused=True)
    gate = device_gate(optimizer, [torch.tensor(1.0)])
    weight.grad = torch.ones(3)
    scalers = torch.tensor(1.0)
    optimizer.found_inf = scalers  # type: ignore[attr-defined]
    optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(3)), "the scaler's overflow is honoured"
    assert optimizer.found_inf is scalers  # type: ignore[attr-defined]
    assert gate.poll()[0][1].what is None


def test_a_fused_sgd_whose_first_step_is_bad_keeps_a_clean_momentum() -> None:
    """torch's kernel would leave momentum uninitialised there, so this one step is decided on the host."""
    weight = nn.Parameter(torch.ones(1000))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9, fused=True)
    gate = device_gate(optimizer, [])
    weight.grad = torch.full((1000,), math.nan)
    optimizer.step()
    weight.grad = torch.ones(1000)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.zeros(1000))
    assert [findings.what for _, findings in gate.poll()] == ["gradient", None]


@pytest.mark.parametrize(("value", "kind"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "inf")])
@pytest.mark.parametrize("clip", [False, True])
def test_a_report_that_arrives_late_names_the_gradient(value: float, kind: str, clip: bool) -> None:
    """Only the largest magnitude of each gradient is kept, so the sign of an infinity is not known."""
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    gate = OptimizerGate(
        optimizer,
        take_losses=lambda: [torch.tensor(1.0)],
        on_called=lambda: None,
        current_step=lambda: 1,
        name_of=lambda parameter: names[id(parameter)],
        mode="device",
    )
    gate.install()
    model(torch.ones(2, 6)).sum().backward()
    model[3].weight.grad[0, 3] = value
    if clip:
        kept: list[Clipping] = []
        clip_grad_norm(
            model.parameters(), 1.0, norm_type=2.0, error_if_nonfinite=False, foreach=None, recover=True,
            say=lambda _: None, keep=kept.append,
        )  # fmt: skip
        kept[0].culprit = None  # on a device nobody looks
        gate.clipping = kept[0]
    before = [p.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad()
    ((_, findings),) = gate.poll(wait=True)
    assert findings.culprit == Culprit("3.weight", kind, 0, 1)  # type: ignore[arg-type]
    assert not findings.applied


@pytest.mark.parametrize(("value", "kind"), [(math.nan, "nan"), (math.inf, "+inf"), (-math.inf, "-inf")])
def test_a_report_that_arrives_late_names_the_loss(value: float, kind: str) -> None:
    weight = nn.Parameter(torch.ones(3))
    losses = [torch.tensor(1.0), torch.tensor(value)]
    gate = device_gate(torch.optim.AdamW([weight], fused=True), losses)
    weight.grad = torch.ones(3)
    gate.optimizer.step()
    ((_, findings),) = gate.poll(wait=True)
    assert findings.culprit == Culprit("loss", kind, 1, 2)  # type: ignore[arg-type]


def test_a_late_verdict_finds_the_place_where_the_data_stood(tmp_path: Path) -> None:
    """As on a GPU, where reports arrive some steps later: here two, because nobody asks before."""
    events: list[Any] = []
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    guard = Guard(tmp_path, observers=[events.append])
    rows = Rows()
    rows.targets[19] = math.nan
    with guard.watch(model=model, optimizer=optimizer):
        session = guard._session
        assert session is not None
        (gate,) = session.steps._gates
        gate.mode = "device"
        session.numbers.remember_places()
        real = gate.poll
        gate.poll = lambda *, wait=False: real(wait=wait) if guard.steps_completed >= 7 or wait else []  # type: ignore[method-assign]
        for batch in guard.batches(DataLoader(rows, batch_size=4), max_steps=8):
            guard.backward(lambda b: nn.functional.mse_loss(model(b[0]), b[1]), batch)
            optimizer.step()
            optimizer.zero_grad()
    (event,) = [event for event in events if isinstance(event, StepSkipped)]
    assert (event.step, event.tensor, event.kind, event.batch_index) == (5, "loss", "nan", 4)
    assert event.samples == (16, 17, 18, 19)
    assert all(p.isfinite().all() for p in model.parameters())


def test_no_alarm_on_the_device_from_large_finite_values() -> None:
    weight = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.AdamW([weight], fused=True)
    gate = device_gate(optimizer, [])
    weight.grad = torch.full((4,), 1e38)
    optimizer.step()
    assert gate.poll()[0][1].what is None


def test_the_way_a_step_is_checked_is_chosen_with_its_reason() -> None:
    weight = nn.Parameter(torch.zeros(4))
    assert choose_mode(torch.optim.AdamW([weight]))[0] == "host"
    meta = nn.Parameter(torch.zeros(4, device="meta"))
    mode, reason = choose_mode(torch.optim.SGD([meta]))
    assert mode == "host"
    assert "fused=True" in reason


# -- GradScaler, several optimizers, wrappers --------------------------------------------------------------------


def test_late_detection_is_for_those_who_cannot_skip_on_the_device() -> None:
    weight = nn.Parameter(torch.zeros(4, device="meta"))
    assert choose_mode(torch.optim.SGD([weight], lr=0.1), "late")[0] == "late"
    assert choose_mode(torch.optim.SGD([nn.Parameter(torch.zeros(4))], lr=0.1, fused=True), "late")[0] == "device"


@pytest.mark.parametrize("fused", [True, False])
def test_a_grad_scaler_overflow_skips_a_step_that_counts(tmp_path: Path, fused: bool) -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    guard = Guard(tmp_path, observers=[], max_skipped_in_a_row=0)
    poisoned = NonFinite({3}, what="gradient", value=math.inf, steps_completed=lambda: guard.steps_completed)
    with guard.watch(model=model, optimizer=optimizer, scaler=scaler):
        for batch in guard.batches([torch.ones(4, 6)], max_steps=5):
            before = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])
            guard.backward(poisoned(lambda b: model(b).square().mean()), batch)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
            assert torch.equal(before, after) == (guard.steps_completed == 2)
    assert (guard.steps_completed, guard.steps_skipped) == (5, 1)
    assert scaler.get_scale() == 2.0**9


def test_several_optimizers_make_one_step_and_one_bad_one_makes_it_bad(tmp_path: Path) -> None:
    left, right = nn.Linear(6, 1), nn.Linear(6, 1)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (left, right)]
    guard = Guard(tmp_path, observers=[])
    with guard.watch(model=[left, right], optimizer=optimizers):
        for batch in guard.batches([torch.ones(4, 6)], max_steps=3):
            kept = left.weight.detach().clone(), right.weight.detach().clone()
            for model, optimizer in zip((left, right), optimizers, strict=True):
                spoil = math.nan if model is right and guard.steps_completed == 1 else 1.0
                guard.backward(lambda b, m=model, s=spoil: m(b).square().mean() * s, batch)
                optimizer.step()
                optimizer.zero_grad()
            if guard.steps_completed == 1:
                assert not torch.equal(left.weight, kept[0])
                assert torch.equal(right.weight, kept[1])
    assert (guard.steps_completed, guard.steps_skipped) == (3, 1)


def test_an_accelerated_optimizer_is_seen_through(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # It is one a process: other tests want another precision.
    request.addfinalizer(lambda: AcceleratorState._reset_state(reset_partial_state=True))

    model = small_model()
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    guard = Guard(tmp_path, observers=[])
    before = [p.detach().clone() for p in model.parameters()]
    with guard.watch(model=prepared, optimizer=optimizer):
        for batch in guard.batches([torch.ones(4, 6)], max_steps=1):
            guard.backward(lambda b: prepared(b).square().mean() * math.nan, batch)
            optimizer.step()
    assert guard.steps_skipped == 1
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("scheduler_inside", [False, True])
def test_hooks_are_gone_after_the_watch(tmp_path: Path, scheduler_inside: bool) -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    before = optimizer.step
    with Guard(tmp_path, observers=[]).watch(model=model, optimizer=optimizer):
        if scheduler_inside:
            torch.optim.lr_scheduler.LinearLR(optimizer)
    assert scheduler_inside or optimizer.step == before
    model(torch.ones(1, 6)).sum().backward()
    model[0].weight.grad.fill_(math.nan)
    optimizer.step()
    assert not model[0].weight.isfinite().all(), "without a guard nothing is guarded"


def test_a_scheduler_built_inside_the_watch_works(tmp_path: Path) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    guard = Guard(tmp_path, observers=[])
    with guard.watch(model=model, optimizer=optimizer):
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=2)
        for batch in guard.batches([torch.ones(4, 6)], max_steps=2):
            guard.backward(lambda b: model(b).square().mean() * math.nan, batch)
            optimizer.step()
            scheduler.step()
    assert scheduler.get_last_lr() == [0.5]
    assert guard.steps_skipped == 2


def test_an_optimizer_that_needs_a_host_read_is_announced_once_with_the_advice(tmp_path: Path) -> None:
    loop = Loop(tmp_path, max_steps=2)
    loop.run()
    assert not [e for e in loop.named(Notice) if "fused=True" in e.text], "on the CPU a read costs nothing"
