"""What a run says about numbers that are none, and what it does about them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.runtime.loops import Rows, small_model
from trainwarden import Guard
from trainwarden.errors import CollapseDetectedError, InvalidSettingError, NaNLossError, StateNotFiniteError
from trainwarden.events import CheckpointSaved, CollapseDetected, Event, SpikeDetected, StepSkipped, to_dict
from trainwarden.guards.collapse import CollapsePolicy
from trainwarden.guards.finite import FinitePolicy
from trainwarden.guards.spikes import SpikePolicy


class Poisoned(Rows):
    """Some samples hold a value that is none."""

    def __init__(self, bad: dict[int, float]) -> None:
        super().__init__()
        self.bad = bad

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, target = super().__getitem__(index)
        return inputs, torch.full_like(target, self.bad[index]) if index in self.bad else target


def run(
    tmp_path: Path, step: Any, *, loader: Any = None, max_steps: int = 3, **options: Any
) -> tuple[Guard, list[Event], nn.Module]:
    """A loop that calls ``step(guard, model, optimizer, batch)`` for each batch."""
    events: list[Event] = []
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    guard = Guard(tmp_path, observers=[events.append], **options)
    torch.manual_seed(2)
    loader = loader or DataLoader(Rows(), batch_size=4, shuffle=True)
    with guard.watch(model=model, optimizer=optimizer):
        for batch in guard.batches(loader, max_steps=max_steps):
            step(guard, model, optimizer, batch)
    return guard, events, model


def loss_of(model: nn.Module) -> Any:
    return lambda batch: nn.functional.mse_loss(model(batch[0]), batch[1])


def plain_step(guard: Guard, model: nn.Module, optimizer: Any, batch: Any) -> None:
    guard.backward(loss_of(model), batch)
    optimizer.step()
    optimizer.zero_grad()


def skipped(events: list[Event]) -> list[StepSkipped]:
    return [event for event in events if isinstance(event, StepSkipped)]


# -- the report ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "kind"), [(math.nan, "nan"), (math.inf, "+inf")])
def test_a_bad_sample_is_found_with_batch_and_kind(tmp_path: Path, value: float, kind: str) -> None:
    loader = DataLoader(Poisoned({17: value}), batch_size=4, shuffle=True)
    _, events, _ = run(tmp_path, plain_step, loader=loader, max_steps=20)
    (event,) = skipped(events)
    assert (event.tensor, event.kind, event.micro_batch, event.epoch) == ("loss", kind, 0, 0)
    assert event.samples is not None
    assert 17 in event.samples
    assert len(event.samples) == 4
    assert event.batch_index == event.step - 1
    assert f"non-finite loss, {kind}, micro-batch 0, epoch 0, batch {event.step - 1}, samples " in str(event)
    assert to_dict(event)["samples"] == event.samples


@pytest.mark.parametrize(("value", "kind"), [(math.nan, "nan"), (math.inf, "+inf"), (-math.inf, "-inf")])
@pytest.mark.parametrize("clip", [False, True])
def test_a_bad_gradient_is_named_even_after_clipping_has_spoiled_the_others(
    tmp_path: Path, value: float, kind: str, clip: bool
) -> None:
    def step(guard: Guard, model: nn.Module, optimizer: Any, batch: Any) -> None:
        guard.backward(loss_of(model), batch)
        if guard.steps_completed == 1:
            model[3].weight.grad[0, 2] = value  # type: ignore[index, union-attr]
        if clip:
            guard.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    guard, events, _ = run(tmp_path, step)
    (event,) = skipped(events)
    assert (event.step, event.what, event.tensor, event.kind) == (2, "gradient", "model.3.weight", kind)
    assert f"{kind} in model.3.weight" in str(event)
    assert guard.steps_skipped == 1


def test_the_backward_pass_of_an_accumulation_window_is_named(tmp_path: Path) -> None:
    loader = DataLoader(Poisoned({0: math.nan}), batch_size=4)  # the first batch of each epoch, in order

    def step(guard: Guard, model: nn.Module, optimizer: Any, batch: Any) -> None:
        guard.backward(loss_of(model), batch)
        step.calls += 1  # type: ignore[attr-defined]
        if step.calls % 3 == 0:  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad()

    step.calls = 1  # type: ignore[attr-defined]  # so that the bad batch is the first of two, later of three
    _, events, _ = run(tmp_path, step, loader=loader, max_steps=2)
    (event,) = skipped(events)
    assert (event.micro_batch, event.batch_index, event.samples) == (0, 0, (0, 1, 2, 3))


def test_several_passes_over_one_batch_name_the_batch(tmp_path: Path) -> None:
    def step(guard: Guard, model: nn.Module, optimizer: Any, batch: Any) -> None:
        for factor in (1.0, math.nan if guard.steps_completed == 1 else 1.0):
            guard.backward(lambda b, f=factor: loss_of(model)(b) * f, batch)
        optimizer.step()
        optimizer.zero_grad()

    _, events, _ = run(tmp_path, step)
    (event,) = skipped(events)
    assert (event.micro_batch, event.batch_index) == (1, 1)
    assert event.samples is not None


def test_the_error_tells_what_the_last_event_told(tmp_path: Path) -> None:
    loader = DataLoader(Poisoned({4: math.nan, 9: math.inf}), batch_size=4)
    with pytest.raises(NaNLossError) as caught:
        run(tmp_path, plain_step, loader=loader, max_steps=9, max_skipped_in_a_row=1)
    expected = {
        "streak": 2, "skipped": 2, "what": "loss", "limit": "streak", "step": 3, "tensor": "loss", "kind": "+inf",
        "micro_batch": 0, "epoch": 0, "batch_index": 2, "samples": [8, 9, 10, 11],
    }  # fmt: skip
    assert expected.items() <= caught.value.details.items()
    assert "loss was not finite for 2 steps in a row (2 skipped in all): +inf in loss at step 3" in str(caught.value)


def test_too_large_a_share_of_bad_steps_ends_the_run(tmp_path: Path) -> None:
    loader = DataLoader(Poisoned(dict.fromkeys(range(0, 80, 16), math.nan)), batch_size=4)  # every fourth batch
    policy = FinitePolicy(max_skipped_share=0.15, share_window_steps=20)
    with pytest.raises(NaNLossError, match="4 of the last 20 steps") as caught:
        run(tmp_path, plain_step, loader=loader, max_steps=60, finite=policy)
    assert (caught.value.details["limit"], caught.value.details["step"]) == ("share", 13)
    assert caught.value.checkpoint_path is not None


def test_to_abort_is_to_stop_at_the_first_bad_step_with_healthy_weights(tmp_path: Path) -> None:
    loader = DataLoader(Poisoned({8: math.nan}), batch_size=4)
    with pytest.raises(NaNLossError) as caught:
        run(tmp_path, plain_step, loader=loader, max_steps=9, finite=FinitePolicy(action="abort"))
    assert (caught.value.details["limit"], caught.value.steps_completed) == ("first", 3)


# -- clipping ------------------------------------------------------------------------------------------------------


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many gradients each check before a step looked at."""
    from trainwarden.runtime import gate

    seen: list[int] = []
    real = gate.looks_finite

    def counting(gradients: Any, losses: Any = ()) -> bool:
        seen.append(len(gradients))
        return real(gradients, losses)

    monkeypatch.setattr(gate, "looks_finite", counting)
    return seen


def clipped_step(guard: Guard, model: nn.Module, optimizer: Any, batch: Any) -> None:
    guard.backward(loss_of(model), batch)
    guard.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def test_the_norm_of_clipping_is_reused_and_no_gradient_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = count_passes(monkeypatch)
    run(tmp_path / "a", clipped_step)
    assert seen == [1, 1, 1], "the total norm alone"
    seen.clear()
    run(tmp_path / "b", plain_step)
    assert seen == [4, 4, 4]


def test_a_gradient_that_was_touched_after_clipping_is_read_again(tmp_path: Path) -> None:
    def step(guard: Guard, model: nn.Module, optimizer: Any, batch: Any) -> None:
        guard.backward(loss_of(model), batch)
        guard.clip_grad_norm_(model.parameters(), 1.0)
        if guard.steps_completed == 1:
            model[0].bias.grad.mul_(math.nan)  # type: ignore[index, union-attr]
        optimizer.step()
        optimizer.zero_grad()

    guard, events, _ = run(tmp_path, step)
    assert guard.steps_skipped == 1
    assert skipped(events)[0].tensor == "model.0.bias"


def test_a_clipping_of_some_parameters_says_nothing_about_the_others(tmp_path: Path) -> None:
    def step(guard: Guard, model: nn.Module, optimizer: Any, batch: Any) -> None:
        guard.backward(loss_of(model), batch)
        if guard.steps_completed == 1:
            model[3].weight.grad.fill_(math.inf)  # type: ignore[index, union-attr]
        guard.clip_grad_norm_(model[0].parameters(), 1.0)  # type: ignore[index]
        optimizer.step()
        optimizer.zero_grad()

    guard, events, _ = run(tmp_path, step)
    assert guard.steps_skipped == 1
    assert (skipped(events)[0].tensor, skipped(events)[0].kind) == ("model.3.weight", "+inf")


# -- weights and optimizer state -----------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_not_written_as_a_checkpoint(tmp_path: Path) -> None:
    def step(guard: Guard, model: nn.Module, optimizer: Any, batch: Any) -> None:
        plain_step(guard, model, optimizer, batch)
        if guard.steps_completed == 3:
            with torch.no_grad():
                model[0].weight[1, 1] = -math.inf  # type: ignore[index, operator]

    events: list[Event] = []
    with pytest.raises(StateNotFiniteError) as caught:
        run(tmp_path, step, max_steps=9, checkpoint_every_steps=2)
    error = caught.value
    assert (error.code, error.exit_code) == ("RUNTIME_STATE_NOT_FINITE", 80)
    assert error.details == {"tensor": "model.0.weight", "kind": "-inf", "step": 4}
    assert str(error.checkpoint_path).endswith("step-00000002")
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000002"]
    assert not events


def test_a_run_whose_weights_broke_does_not_end_as_a_success(tmp_path: Path) -> None:
    def step(guard: Guard, model: nn.Module, optimizer: Any, batch: Any) -> None:
        plain_step(guard, model, optimizer, batch)
        optimizer.state[model[0].weight]["momentum_buffer"] = torch.full((16, 6), math.nan)  # type: ignore[index]

    with pytest.raises(StateNotFiniteError, match=r"optimizer momentum_buffer of model\.0\.weight holds nan"):
        run(tmp_path, step)


def test_infinities_in_a_mask_are_nobodys_business(tmp_path: Path) -> None:
    events: list[Event] = []
    model = small_model()
    model.register_buffer("mask", torch.full((4, 4), -math.inf))
    model[0].bias.requires_grad_(False)[0] = math.inf
    trained = [p for p in model.parameters() if p.requires_grad]
    guard = Guard(tmp_path, observers=[events.append])
    with guard.watch(model=model, optimizer=torch.optim.SGD(trained, lr=0.1)):
        for _ in guard.batches([torch.ones(2, 6)], max_steps=1):
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            guard._session.watched.optimizers["optimizer"].step()  # type: ignore[union-attr]
    assert [event.step for event in events if isinstance(event, CheckpointSaved)] == [1]


# -- spikes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [False, True])
def test_a_spike_is_seen_in_what_the_step_knows_anyway(tmp_path: Path, clip: bool) -> None:
    rows = Rows(count=400)
    rows.targets[320] = 1e4
    policy = SpikePolicy(window_values=32, least_values=16)
    loader = DataLoader(rows, batch_size=4)
    _, events, _ = run(tmp_path, clipped_step if clip else plain_step, loader=loader, max_steps=90, spikes=policy)
    spikes = [event for event in events if isinstance(event, SpikeDetected)]
    assert {(event.step, event.signal) for event in spikes} == {(81, "loss"), (81, "grad_norm")}
    assert all(event.value > 100 * event.usual for event in spikes), "the norm is that from before clipping"


def test_bad_steps_do_not_blind_the_search_for_spikes(tmp_path: Path) -> None:
    rows = Poisoned(dict.fromkeys(range(0, 300, 20), math.nan) | {361: 1e4})
    rows.inputs, rows.targets = Rows(count=400).inputs, Rows(count=400).targets
    policy = SpikePolicy(window_values=32, least_values=16)
    loader = DataLoader(rows, batch_size=4)
    guard, events, _ = run(tmp_path, plain_step, loader=loader, max_steps=95, spikes=policy, max_skipped_in_a_row=9)
    assert guard.steps_skipped == 15
    assert {event.step for event in events if isinstance(event, SpikeDetected)} == {91}


# -- collapse ------------------------------------------------------------------------------------------------------


def collapsing(guard: Guard, model: nn.Module, optimizer: Any, batch: Any) -> None:
    """Trains nothing, and lets the first layer shrink from step to step."""
    guard.backward(loss_of(model), batch)
    with torch.no_grad():
        model[0].weight.mul_(0.6)  # type: ignore[index, union-attr, operator]
    optimizer.step()
    optimizer.zero_grad()


POLICY = CollapsePolicy(every_steps=2, patience=2)


def watched_run(tmp_path: Path, source: Any, policy: CollapsePolicy = POLICY, step: Any = collapsing) -> list[Event]:
    events: list[Event] = []
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    guard = Guard(tmp_path, observers=[events.append])
    guard.watch_representation("encoder", source(model), policy=policy)
    torch.manual_seed(2)
    try:
        with guard.watch(model=model, optimizer=optimizer):
            for batch in guard.batches(DataLoader(Rows(), batch_size=8), max_steps=20):
                step(guard, model, optimizer, batch)
    finally:
        assert not model[0]._forward_hooks, "no hook stays"
    return events


HELD_OUT = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
SOURCES = {
    "a module": lambda model: model[0],
    "a callable": lambda model: lambda: model[0](HELD_OUT),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_representation_that_collapses_ends_the_run(tmp_path: Path, name: str) -> None:
    with pytest.raises(CollapseDetectedError) as caught:
        watched_run(tmp_path, SOURCES[name])
    error = caught.value
    assert (error.code, error.exit_code, error.aliases) == (
        "RUNTIME_COLLAPSE_DETECTED",
        80,
        ("TRAINING.COLLAPSE_DETECTED",),
    )
    assert error.details["representation"] == "encoder"
    assert error.details["value"] < error.details["threshold"]
    assert error.details["step"] in (6, 8)


def test_a_collapse_may_be_told_only(tmp_path: Path) -> None:
    policy = CollapsePolicy("announce", every_steps=2, patience=2)
    events = watched_run(tmp_path, SOURCES["a module"], policy)
    (told,) = [event for event in events if isinstance(event, CollapseDetected)]
    assert told.representation == "encoder"


@pytest.mark.parametrize("name", SOURCES)
def test_a_healthy_representation_is_left_alone_and_so_is_the_training(tmp_path: Path, name: str) -> None:
    def noisy(model: nn.Module) -> Any:
        source = SOURCES[name](model)
        return source if isinstance(source, nn.Module) else lambda: source() + torch.randn(32, 16)

    def trained(folder: str, source: Any) -> torch.Tensor:
        models: list[nn.Module] = []
        watched_run(tmp_path / folder, lambda model: models.append(model) or source(model), step=plain_step)
        return torch.cat([p.detach().reshape(-1) for p in models[0].parameters()])

    assert torch.equal(trained("a", noisy), trained("b", lambda _model: nn.Identity()))


def test_a_name_is_given_once(tmp_path: Path) -> None:
    guard = Guard(tmp_path, observers=[])
    guard.watch_representation("encoder", nn.Identity())
    with pytest.raises(InvalidSettingError, match="a free name"):
        guard.watch_representation("encoder", nn.Identity())
