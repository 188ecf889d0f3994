"""A run that was interrupted continues bit-identically, says where, and refuses to continue as something else."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from tests.runtime.loops import Loop, Rows, distance, small_model
from trainwarden import Guard
from trainwarden.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    DatasetError,
    DiskFullError,
    InvalidSettingError,
    ResumeMismatchError,
    RunExistsError,
    RunLockedError,
)
from trainwarden.events import (
    CheckpointFailed,
    CheckpointRejected,
    CheckpointSaved,
    Notice,
    Resumed,
    RunFinished,
    StepCompleted,
)
from trainwarden.runs import Ledger
from trainwarden.runtime.keeper import CheckpointPolicy
from trainwarden.testing import MemoryCeiling


class Interrupted(Exception):  # noqa: N818 - stands for whatever a user's code may raise
    pass


def interrupt_after(step: int) -> Any:
    def after_step(guard: Guard) -> None:
        if guard.steps_completed + 1 == step:
            raise Interrupted

    return after_step


def noisy_loader() -> DataLoader[Any]:
    return DataLoader(Rows(40, noise=True), batch_size=8, shuffle=True)


@pytest.fixture
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Loop]:
    """What a run comes to that nobody interrupts and that takes no checkpoint on its way, by ``fused``."""
    return {
        fused: Loop(
            tmp_path_factory.mktemp("whole"), loader=noisy_loader(), max_steps=20, dropout=0.3, fused=fused
        ).run()
        for fused in (False, True)
    }


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stop=st.integers(2, 19), every=st.integers(1, 5), fused=st.booleans())
def test_an_interrupted_run_ends_bit_identically(
    tmp_path_factory: pytest.TempPathFactory, uninterrupted: dict[bool, Loop], stop: int, every: int, fused: bool
) -> None:
    """Dropout, sample noise, a shuffled loader over several epochs and a scheduler: all draws must be the same."""
    options: dict[str, Any] = {"max_steps": 20, "dropout": 0.3, "fused": fused}
    options["guard_options"] = {"checkpoint_every_steps": every}
    run_dir = tmp_path_factory.mktemp("b")
    with pytest.raises(Interrupted):
        Loop(run_dir, loader=noisy_loader(), after_step=interrupt_after(stop), **options).run()
    random.seed(99)
    resumed = Loop(run_dir, loader=noisy_loader(), **options).run()
    assert torch.equal(resumed.weights(), uninterrupted[fused].weights())
    assert resumed.guard.steps_completed == 20
    saved = (stop - 1) // every * every
    assert [e.step for e in resumed.named(Resumed)] == ([saved] if saved else [])
    assert resumed.losses == uninterrupted[fused].losses[saved:]


def test_a_resume_says_where_it_continues(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        Loop(tmp_path, after_step=interrupt_after(6), guard_options={"checkpoint_every_steps": 2}).run()
    loop = Loop(tmp_path).run()
    (event,) = loop.named(Resumed)
    assert (event.step, event.epoch, event.batch_index) == (4, 0, 4)
    assert "step 4, epoch 0, batch 4" in str(event)
    assert event.checkpoint_path.endswith("checkpoints/step-00000004")
    assert event.run_id == json.loads((tmp_path / "run.json").read_text())["run_id"]


def test_the_learned_micro_batch_is_known_after_a_resume(tmp_path: Path) -> None:
    def disturb(compute_loss: Any, guard: Guard) -> Any:
        return MemoryCeiling(4)(compute_loss)

    options: dict[str, Any] = {"guard_options": {"checkpoint_every_steps": 1}, "disturb": disturb}
    with pytest.raises(Interrupted):
        Loop(tmp_path, after_step=interrupt_after(4), **options).run()
    resumed = Loop(tmp_path, **options).run()
    assert resumed.guard.micro_batch_size == 4
    assert resumed.guard.shrinks == 1, "nothing had to be learned again"


def test_a_finished_run_yields_nothing_and_says_so(tmp_path: Path) -> None:
    first = Loop(tmp_path).run()
    again = Loop(tmp_path).run()
    assert again.losses == []
    assert torch.equal(first.weights(), again.weights())
    assert any("nothing left to do" in e.text for e in again.named(Notice))
    assert again.named(RunFinished)[0].status == "finished"


def test_leaving_the_loop_early_saves_what_was_trained(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    with loop.guard.watch(model=loop.model, optimizer=loop.optimizer):
        for batch in loop.guard.batches([torch.ones(4, 6)], max_steps=10):
            loop.guard.backward(lambda b: loop.model(b).square().mean(), batch)
            loop.optimizer.step()
            loop.optimizer.zero_grad()
            if loop.guard.steps_completed == 2:
                break
    assert loop.guard.steps_completed == 3
    assert loop.guard.newest_checkpoint is not None
    assert loop.guard.newest_checkpoint.name == "step-00000003"
    assert loop.named(RunFinished)[0].status == "stopped"


# -- what may continue what --------------------------------------------------------------------------------------


def test_resume_never_refuses_a_used_directory_and_leaves_it_as_it_is(tmp_path: Path) -> None:
    Loop(tmp_path).run()
    before = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    with pytest.raises(RunExistsError):
        Loop(tmp_path, guard_options={"resume": "never"}).run()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == before


def test_resume_must_refuses_a_directory_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        Loop(tmp_path, guard_options={"resume": "must"}).run()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_steps": 12}, "max_steps"),
        ({"batch_size": 4}, "loader.batch_size"),
        ({"make_optimizer": lambda p: torch.optim.AdamW(p, lr=3e-3)}, "optimizer.groups[0].lr"),
        ({"make_optimizer": lambda p: torch.optim.SGD(p, lr=1e-2)}, "optimizer.type"),
    ],
)
def test_code_that_asks_for_something_else_is_refused_with_the_difference(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(Interrupted):
        Loop(tmp_path, after_step=interrupt_after(4), guard_options={"checkpoint_every_steps": 1}).run()
    with pytest.raises(ResumeMismatchError) as caught:
        Loop(tmp_path, **change).run()
    differences = caught.value.details["differences"]
    assert named in differences
    assert set(differences[named]) == {"saved", "now"}
    assert caught.value.exit_code == 78


def test_a_model_of_another_shape_is_refused_by_its_parameter(tmp_path: Path) -> None:
    Loop(tmp_path).run()
    other = Loop(tmp_path)
    other.model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Dropout(0.0), nn.Linear(9, 1))
    other.optimizer = torch.optim.AdamW(other.model.parameters(), lr=1e-2)
    with pytest.raises(ResumeMismatchError) as caught:
        other.run()
    assert caught.value.details["differences"]["model.0.weight"] == {
        "saved": "float32[16x6]",
        "now": "float32[9x6]",
    }


def test_what_was_watched_and_is_no_longer_is_refused_by_its_name(tmp_path: Path) -> None:
    first, second = nn.Linear(6, 1), nn.Linear(6, 1)
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=1e-2)

    def run(**models: nn.Module) -> None:
        guard = Guard(tmp_path, observers=[])
        with guard.watch(model=models, optimizer=optimizer):
            for batch in guard.batches([torch.ones(4, 6)], max_steps=1):
                guard.backward(lambda b: (first(b) + second(b)).square().mean(), batch)
                optimizer.step()

    run(first=first, second=second)
    with pytest.raises(ResumeMismatchError) as caught:
        run(first=first)
    assert set(caught.value.details["differences"]) == {"model.second.weight", "model.second.bias"}


@pytest.mark.parametrize("accepted", [["max_steps"], ["loader", "max_steps"]])
def test_a_change_that_is_meant_is_accepted_by_name(tmp_path: Path, accepted: list[str]) -> None:
    Loop(tmp_path).run()
    longer = Loop(tmp_path, max_steps=14, guard_options={"accept_changes": accepted}).run()
    assert longer.guard.steps_completed == 14
    assert len(longer.losses) == 4


def test_two_processes_cannot_train_in_one_directory(tmp_path: Path) -> None:
    loop, second = Loop(tmp_path), Loop(tmp_path)
    with loop.guard.watch(model=loop.model, optimizer=loop.optimizer), pytest.raises(RunLockedError):
        second.run()


def test_several_loaders_in_turn_resume_in_the_one_that_was_interrupted(tmp_path: Path) -> None:
    def run(run_dir: Path, stop: int | None) -> list[float]:
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        guard = Guard(run_dir, observers=[], checkpoint_every_steps=1)
        seen: list[float] = []
        torch.manual_seed(0)
        with guard.watch(model=model, optimizer=optimizer):
            for offset, last in ((0.0, 4), (100.0, 8)):
                loader = DataLoader([torch.full((6,), offset + i) for i in range(12)], batch_size=2, shuffle=True)
                for batch in guard.batches(loader, max_steps=last):
                    if guard.steps_completed == stop:
                        raise Interrupted
                    seen.append(float(batch[0, 0]))
                    guard.backward(lambda b: model(b).square().mean() * 1e-6, batch)
                    optimizer.step()
                    optimizer.zero_grad()
        return seen

    whole = run(tmp_path / "a", None)
    with pytest.raises(Interrupted):
        run(tmp_path / "b", 6)
    assert run(tmp_path / "b", None) == whole[6:]


# -- accumulation ------------------------------------------------------------------------------------------------


def accumulate(run_dir: Path, window: int, stop_at_batch: int | None = None) -> tuple[Guard, torch.Tensor, list[int]]:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    events: list[Any] = []
    guard = Guard(run_dir, observers=[events.append], checkpoint_every_steps=1)
    torch.manual_seed(0)
    with guard.watch(model=model, optimizer=optimizer):
        for count, (x, _) in enumerate(guard.batches(noisy_loader(), max_steps=6), start=1):
            if count == stop_at_batch:
                raise Interrupted
            guard.backward(lambda b: model(b).square().mean() / window, x)
            if count % window == 0:
                optimizer.step()
                optimizer.zero_grad()
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return guard, weights, [e.step for e in events if isinstance(e, CheckpointSaved)]


def test_a_step_is_an_optimizer_step_and_checkpoints_lie_between_steps(tmp_path: Path) -> None:
    guard, _, saved = accumulate(tmp_path, window=3)
    assert guard.steps_completed == 6
    assert saved == [1, 2, 3, 4, 5, 6]


def test_a_run_interrupted_inside_an_accumulation_window_repeats_the_window(tmp_path: Path) -> None:
    _, whole, _ = accumulate(tmp_path / "a", window=3)
    with pytest.raises(Interrupted):
        accumulate(tmp_path / "b", window=3, stop_at_batch=8)
    guard, resumed, _ = accumulate(tmp_path / "b", window=3)
    assert torch.equal(resumed, whole)
    assert guard.steps_completed == 6


def test_leaving_inside_an_accumulation_window_does_not_lose_its_batches(tmp_path: Path) -> None:
    """A checkpoint there would say that batches were trained whose gradients are gone."""

    def run(run_dir: Path, leave_at: int | None) -> list[float]:
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        guard = Guard(run_dir, observers=[], checkpoint_every_steps=2)
        trained: list[float] = []
        window: list[float] = []
        data = [torch.full((2, 6), float(i)) for i in range(12)]
        with guard.watch(model=model, optimizer=optimizer):
            for batch in guard.batches(data, max_steps=4):
                guard.backward(lambda b: model(b).square().mean() * 1e-6, batch)
                window.append(float(batch[0, 0]))
                if len(window) == 3:
                    optimizer.step()
                    optimizer.zero_grad()
                    trained += window
                    window = []
                if leave_at == float(batch[0, 0]):
                    break
        return trained

    whole = run(tmp_path / "a", None)
    first = run(tmp_path / "b", 7.0)
    assert first + run(tmp_path / "b", None) == whole


def test_a_refused_start_leaves_the_ledger_and_the_stored_command_as_they_were(tmp_path: Path) -> None:
    Loop(tmp_path).run()
    before = Ledger().find(str(tmp_path)), (tmp_path / "run.json").read_bytes()
    with pytest.raises(ResumeMismatchError):
        Loop(tmp_path, make_optimizer=lambda p: torch.optim.SGD(p, lr=1.0), guard_options={"command": ["other"]}).run()
    assert (Ledger().find(str(tmp_path)), (tmp_path / "run.json").read_bytes()) == before


# -- what is in a checkpoint -------------------------------------------------------------------------------------


def test_python_numpy_and_torch_random_streams_continue(tmp_path: Path) -> None:
    def run(run_dir: Path, stop: int | None) -> list[tuple[float, float, float]]:
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        guard = Guard(run_dir, observers=[], checkpoint_every_steps=1)
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        drawn = []
        with guard.watch(model=model, optimizer=optimizer):
            for batch in guard.batches([torch.ones(2, 6)], max_steps=6):
                if guard.steps_completed == stop:
                    raise Interrupted
                drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
                guard.backward(lambda b: model(b).square().mean(), batch)
                optimizer.step()
                optimizer.zero_grad()
        return drawn

    whole = run(tmp_path / "a", None)
    with pytest.raises(Interrupted):
        run(tmp_path / "b", 3)
    assert run(tmp_path / "b", None) == whole[3:]


def test_other_objects_with_state_are_checkpointed_by_their_name(tmp_path: Path) -> None:
    class Average:
        def __init__(self) -> None:
            self.value = 0.0

        def state_dict(self) -> dict[str, float]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, float]) -> None:
            self.value = state["value"]

    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = Average()
    with Guard(tmp_path, observers=[]).watch(model=model, optimizer=optimizer, ema=average) as guard:
        for batch in guard.batches([torch.ones(2, 6)], max_steps=2):
            guard.backward(lambda b: model(b).square().mean(), batch)
            optimizer.step()
            average.value += 1.5
    restored = Average()
    with Guard(tmp_path, observers=[]).watch(model=model, optimizer=optimizer, ema=restored):
        assert restored.value == 3.0


@pytest.mark.parametrize("name", ["model", "guard", "../escape"])
def test_a_name_that_is_taken_or_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(InvalidSettingError),
        Guard(tmp_path).watch(
            model={"x": model} if name == "model" else model,
            optimizer=optimizer,
            **{name: optimizer} if name != "model" else {"guard": 3},
        ),
    ):
        pass


def test_frozen_parameters_can_be_left_to_the_code_that_builds_the_model(tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        model = small_model()
        model[0].requires_grad_(False)
        return model

    def run(model: nn.Sequential, steps: int) -> Guard:
        optimizer = torch.optim.SGD(model[3].parameters(), lr=0.1)
        guard = Guard(tmp_path, observers=[], save_frozen=False, accept_changes=["max_steps"])
        with guard.watch(model=model, optimizer=optimizer):
            for batch in guard.batches([torch.ones(2, 6)], max_steps=steps):
                guard.backward(lambda b: model(b).square().mean(), batch)
                optimizer.step()
        return guard

    run(first := build(), 2)
    run(second := build(), 2)
    assert torch.equal(first[3].weight, second[3].weight)
    names = json.loads((tmp_path / "checkpoints/step-00000002/model.json").read_text())
    assert "0.weight" not in json.dumps(names)


# -- trouble with checkpoints ------------------------------------------------------------------------------------


def test_a_torn_checkpoint_is_announced_and_the_one_before_it_continues_bit_identically(
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = {"dropout": 0.3, "guard_options": {"checkpoint_every_steps": 3}}
    whole = Loop(tmp_path / "a", **options).run()
    with pytest.raises(Interrupted):
        Loop(tmp_path / "b", after_step=interrupt_after(8), **options).run()
    victim = tmp_path / "b/checkpoints/step-00000006/optimizer.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    resumed = Loop(tmp_path / "b", **options).run()
    (rejected,) = resumed.named(CheckpointRejected)
    assert "step-00000006" in rejected.path
    assert resumed.named(Resumed)[0].step == 3
    assert torch.equal(resumed.weights(), whole.weights())


@pytest.mark.parametrize("part", ["model", "optimizer", "scheduler", "guard"])
def test_a_checkpoint_missing_a_part_is_refused(tmp_path: Path, part: str) -> None:
    Loop(tmp_path, max_steps=3).run()
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    (checkpoint / f"{part}.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        Loop(tmp_path, max_steps=3).run()
    assert caught.value.code == "STATE_CHECKPOINT_INVALID"
    assert checkpoint.exists(), "evidence is kept"


def test_a_watched_object_the_checkpoint_does_not_know_is_refused(tmp_path: Path) -> None:
    Loop(tmp_path, max_steps=3).run()
    loop = Loop(tmp_path, max_steps=3, guard_options={"accept_changes": ["ema"]})
    ema = small_model()
    with (
        pytest.raises(CheckpointError, match="no part ema"),
        loop.guard.watch(model=loop.model, optimizer=loop.optimizer, scheduler=loop.scheduler, ema=ema),
    ):
        pass


def test_a_periodic_checkpoint_that_fails_is_announced_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainwarden.checkpoint import CheckpointStore

    real, calls = CheckpointStore.save, []

    def full_twice(store: Any, step: int, *rest: Any) -> Path:
        calls.append(step)
        if len(calls) <= 2:
            raise DiskFullError(path="x", needed_bytes=2, free_bytes=1)
        return real(store, step, *rest)

    monkeypatch.setattr(CheckpointStore, "save", full_twice)
    loop = Loop(tmp_path, guard_options={"checkpoint_every_steps": 1}).run()
    assert [e.step for e in loop.named(CheckpointFailed)] == [1, 2]
    assert [e.step for e in loop.named(CheckpointSaved)] == list(range(3, 11))


def test_three_failures_in_a_row_end_the_run_with_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainwarden.checkpoint import CheckpointStore

    real = CheckpointStore.save

    def full_from_4(store: Any, step: int, *rest: Any) -> Path:
        if step >= 4:
            raise DiskFullError(path="x", needed_bytes=2, free_bytes=1)
        return real(store, step, *rest)

    monkeypatch.setattr(CheckpointStore, "save", full_from_4)
    with pytest.raises(DiskFullError) as caught:
        Loop(tmp_path, guard_options={"checkpoint_every_steps": 1}).run()
    assert caught.value.steps_completed == 6
    assert str(caught.value.checkpoint_path).endswith("step-00000003")
    assert caught.value.exit_code == 74


def test_unrelated_files_in_the_run_directory_survive(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best").write_text("mine too")
    Loop(tmp_path, guard_options={"checkpoint_every_steps": 1}).run()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "checkpoints" / "best").read_text() == "mine too"
    steps = sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*"))
    assert steps == ["step-00000009", "step-00000010"]


# -- when ---------------------------------------------------------------------------------------------------------


@given(
    every_steps=st.none() | st.integers(1, 50),
    every_s=st.none() | st.floats(0.1, 1e6),
    steps=st.integers(0, 200),
    seconds=st.floats(0, 1e7),
)
def test_a_checkpoint_is_due_by_steps_or_by_seconds_and_never_twice_for_one_step(
    every_steps: int | None, every_s: float | None, steps: int, seconds: float
) -> None:
    policy = CheckpointPolicy(every_steps, every_s)
    due = policy.due_by_steps(steps) or policy.due_by_time(steps, seconds)
    by_steps = every_steps is not None and steps >= every_steps
    by_time = every_s is not None and seconds >= every_s
    assert due == (steps > 0 and (by_steps or by_time))


def test_the_clock_asks_for_checkpoints_at_step_boundaries(tmp_path: Path) -> None:
    now = [0.0]

    def tick(guard: Guard) -> None:
        now[0] += 4.0

    loop = Loop(tmp_path, guard_options={"checkpoint_every_s": 10.0, "clock": lambda: now[0]}, after_step=tick)
    loop.run()
    assert [e.step for e in loop.named(CheckpointSaved)] == [3, 6, 9, 10]


@pytest.mark.parametrize(
    "options",
    [
        {"checkpoint_every_steps": 0},
        {"checkpoint_every_steps": True},
        {"checkpoint_every_s": -1},
        {"keep_last": 0},
        {"max_shrinks": -1},
        {"max_skipped_in_a_row": 1.5},
        {"resume": "maybe"},
        {"split_check": "sometimes"},
    ],
)
def test_settings_out_of_range_are_refused_at_construction(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidSettingError) as caught:
        Guard(tmp_path / "run", **options)
    assert caught.value.details["setting"] == next(iter(options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("max_steps", [0, -3, 2.5, True])
def test_a_step_count_that_is_none_is_refused(tmp_path: Path, max_steps: Any) -> None:
    with pytest.raises(InvalidSettingError, match="max_steps"):
        Loop(tmp_path, max_steps=max_steps).run()


def test_a_loop_that_steps_another_optimizer_does_not_run_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainwarden.runtime.session.MAX_BATCHES_WITHOUT_STEP", 20)
    model = small_model()
    watched, other = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    guard = Guard(tmp_path, observers=[])
    with (
        pytest.raises(InvalidSettingError, match="not stepped in 20 batches"),
        guard.watch(model=model, optimizer=watched),
    ):
        for batch in guard.batches([torch.ones(2, 6)], max_steps=3):
            guard.backward(lambda b: model(b).square().mean(), batch)
            other.step()


def test_an_empty_loader_is_an_error_of_the_run(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        Loop(tmp_path, loader=[]).run()
    assert caught.value.run_id is not None


def test_calls_outside_a_watch_say_so(tmp_path: Path) -> None:
    guard = Guard(tmp_path)
    with pytest.raises(InvalidSettingError, match="outside watch"):
        guard.backward(lambda b: b, torch.ones(1))
    with pytest.raises(InvalidSettingError, match="outside watch"):
        next(guard.batches([1], max_steps=1))


def test_an_observer_that_fails_is_dropped_and_the_run_goes_on(tmp_path: Path) -> None:
    heard: list[Any] = []

    def broken(event: Any) -> None:
        if isinstance(event, StepCompleted):
            raise ValueError("out of paper")

    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = Guard(tmp_path, observers=[broken, heard.append])
    with guard.watch(model=model, optimizer=optimizer):
        for batch in guard.batches([torch.ones(2, 6)], max_steps=3):
            guard.backward(lambda b: model(b).square().mean(), batch)
            optimizer.step()
    assert guard.steps_completed == 3
    assert sum("out of paper" in str(e) for e in heard) == 1


def test_compiled_models_and_autocast_are_ordinary_use(tmp_path: Path) -> None:
    def run(run_dir: Path, rows_that_fit: int) -> torch.Tensor:
        model = small_model()
        compiled = torch.compile(model, backend="aot_eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        guard = Guard(run_dir, observers=[])

        def loss(b: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return compiled(b).float().square().mean()

        with guard.watch(model=compiled, optimizer=optimizer):
            for batch in guard.batches([torch.randn(8, 6, generator=torch.Generator().manual_seed(1))], max_steps=4):
                guard.backward(MemoryCeiling(rows_that_fit)(loss), batch)
                optimizer.step()
                optimizer.zero_grad()
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    assert distance(run(tmp_path / "b", 3), run(tmp_path / "a", 8)) < 1e-2
