"""A run that goes back: which checkpoint it continues from, which batches it leaves out, and when it may not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.runtime.loops import Loop, Rows
from trainwarden import Guard
from trainwarden.errors import CheckpointError, LossSpikeError, NaNLossError, RollbackNeededError
from trainwarden.events import CheckpointSaved, Resumed, RolledBack, RunFinished, SpikeDetected, StepSkipped
from trainwarden.guards.finite import FinitePolicy
from trainwarden.guards.rollback import RollbackPolicy
from trainwarden.guards.spikes import SpikePolicy
from trainwarden.runtime import rollbacks

STEPS = 60
SPIKES = SpikePolicy("rollback", window_values=32, least_values=16)
ONLY_THE_BATCHES = RollbackPolicy(skip_steps_before=0)


class Bad(Rows):
    """The samples that ``bad`` names are not like the others."""

    def __init__(self, bad: set[int], value: float) -> None:
        super().__init__(count=800)
        self.bad, self.value = bad, value

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, target = super().__getitem__(index)
        return inputs, target * self.value if index in self.bad else target


def loader_of(bad: set[int] | None = None, value: float = 1e4) -> DataLoader[Any]:
    return DataLoader(Bad(bad or set(), value), batch_size=8, shuffle=True)


def order() -> list[list[int]]:
    """The samples of each batch, in the order in which the loops here draw them."""
    torch.manual_seed(11)
    torch.empty((), dtype=torch.int64).random_()  # the loader's base seed
    return list(loader_of().batch_sampler or [])


class LeavingOut:
    """The same loader without the batches of some steps (from 1)."""

    def __init__(self, steps: set[int]) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[Any]:
        for step, batch in enumerate(loader_of(), start=1):
            if step not in self.steps:
                yield batch


def loop(run_dir: Path, *, steps: int = STEPS, loader: Any = None, **options: Any) -> Loop:
    options.setdefault("rollback", ONLY_THE_BATCHES)
    made = Loop(run_dir, max_steps=steps, loader=loader or loader_of(), guard_options=options)
    for group in made.optimizer.param_groups:
        group["lr"] = 1e-3
    return made


def bad_at(steps: set[int]) -> set[int]:
    return {order()[step - 1][0] for step in steps}


def test_the_order_that_the_tests_go_by_is_that_of_the_loops(tmp_path: Path) -> None:
    one = loop(tmp_path, steps=3).run()
    assert one.loader.dataset.loaded[:24] == [sample for batch in order()[:3] for sample in batch]


def spiking(run_dir: Path, at: set[int] = frozenset({40}), **options: Any) -> Loop:  # type: ignore[assignment]
    options.setdefault("spikes", SPIKES)
    return loop(run_dir, loader=loader_of(bad_at(at)), checkpoint_every_steps=10, **options)


def test_a_spike_ends_a_raw_loop_with_an_error_that_says_resume(tmp_path: Path) -> None:
    broken = spiking(tmp_path)
    with pytest.raises(RollbackNeededError) as caught:
        broken.run()
    error = caught.value
    assert (error.code, error.exit_code, error.retryable) == ("RUNTIME_ROLLBACK_NEEDED", 75, True)
    assert (error.first_step, error.last_step, error.checkpoint_step) == (40, 40, 30)
    assert (error.rollbacks, error.max_rollbacks) == (1, 3)
    assert {event.signal for event in broken.named(SpikeDetected)} == {"loss", "grad_norm"}
    assert not [event for event in broken.named(CheckpointSaved) if event.step == 40], "spoiled weights are not saved"
    (finished,) = broken.named(RunFinished)
    assert (finished.status, finished.code) == ("stopped", "RUNTIME_ROLLBACK_NEEDED")


def test_the_next_start_continues_as_if_the_batch_had_never_been_there(tmp_path: Path) -> None:
    with pytest.raises(RollbackNeededError):
        spiking(tmp_path / "a").run()
    again = spiking(tmp_path / "a").run()
    (resumed,) = again.named(Resumed)
    (back,) = again.named(RolledBack)
    assert (resumed.step, back.step, back.first_step, back.last_step) == (30, 30, 40, 40)
    assert again.guard.steps_completed == STEPS
    reference = loop(tmp_path / "b", loader=LeavingOut({40})).run()
    assert torch.equal(again.weights(), reference.weights())


def test_the_same_guard_goes_back_in_place_when_watch_is_entered_again(tmp_path: Path) -> None:
    one = spiking(tmp_path / "a", resume="never")
    with pytest.raises(RollbackNeededError):
        one.run()
    assert one.guard.steps_completed == 40
    one.loader = loader_of(bad_at({40}))
    one.run()
    assert one.guard.steps_completed == STEPS
    reference = loop(tmp_path / "b", loader=LeavingOut({40})).run()
    assert torch.equal(one.weights(), reference.weights())
    assert one.learning_rates[-1] == reference.learning_rates[-1]


def test_batches_before_the_spike_are_left_out_too_where_the_policy_says_so(tmp_path: Path) -> None:
    policy = RollbackPolicy(skip_steps_before=5)
    with pytest.raises(RollbackNeededError):
        spiking(tmp_path / "a", rollback=policy).run()
    again = spiking(tmp_path / "a", rollback=policy).run()
    reference = loop(tmp_path / "b", loader=LeavingOut({35, 36, 37, 38, 39, 40})).run()
    assert torch.equal(again.weights(), reference.weights())


def test_the_learning_rate_is_lowered_for_good(tmp_path: Path) -> None:
    policy = RollbackPolicy(learning_rate_factor=0.5, skip_steps_before=0)
    first = spiking(tmp_path, rollback=policy)
    with pytest.raises(RollbackNeededError):
        first.run()
    again = spiking(tmp_path, rollback=policy).run()
    assert again.learning_rates[0] == pytest.approx(first.learning_rates[30] / 2)
    assert again.optimizer.param_groups[0]["lr"] == pytest.approx(first.learning_rates[-1] / 2)
    (back,) = again.named(RolledBack)
    assert back.learning_rate_factor == 0.5
    more = loop(tmp_path, steps=STEPS + 5, loader=loader_of(bad_at({40})), accept_changes=["max_steps"]).run()
    assert not more.named(RolledBack), "the checkpoints since have it behind them"
    assert more.optimizer.param_groups[0]["lr"] == pytest.approx(first.learning_rates[-1] / 2)


def test_a_run_goes_back_as_often_as_it_may_and_then_ends(tmp_path: Path) -> None:
    policy = RollbackPolicy(max_rollbacks=2, skip_steps_before=0)
    at = {40, 46, 52}
    for expected in (1, 2):
        with pytest.raises(RollbackNeededError) as caught:
            spiking(tmp_path, at, rollback=policy).run()
        assert caught.value.rollbacks == expected
    with pytest.raises(LossSpikeError, match="gone back 2 times already") as final:
        spiking(tmp_path, at, rollback=policy).run()
    assert final.value.exit_code == 80
    assert final.value.details["signal"] == "grad_norm"


def test_without_a_checkpoint_of_its_own_the_run_goes_back_to_its_beginning(tmp_path: Path) -> None:
    with pytest.raises(RollbackNeededError) as caught:
        loop(tmp_path / "a", loader=loader_of(bad_at({40})), spikes=SPIKES).run()
    assert caught.value.checkpoint_step == 0
    again = loop(tmp_path / "a", loader=loader_of(bad_at({40})), spikes=SPIKES).run()
    reference = loop(tmp_path / "b", loader=LeavingOut({40})).run()
    assert torch.equal(again.weights(), reference.weights())


def test_a_start_that_was_killed_before_the_newer_checkpoints_were_gone_goes_back_all_the_same(tmp_path: Path) -> None:
    whole = loop(tmp_path / "a", steps=50, checkpoint_every_steps=10, keep_last=9, spikes=SPIKES).run()
    assert whole.guard.steps_completed == 50
    with pytest.raises(RollbackNeededError):
        spiking(tmp_path / "b").run()
    record = (tmp_path / "b" / rollbacks.FILE).read_text(encoding="utf-8")
    (tmp_path / "a" / rollbacks.FILE).write_text(record, encoding="utf-8")
    again = loop(tmp_path / "a", steps=50, checkpoint_every_steps=10, keep_last=9, spikes=SPIKES).run()
    assert [event.step for event in again.named(Resumed)] == [30]
    assert again.guard.steps_completed == 50


def test_a_record_that_cannot_be_read_is_no_reason_to_train_the_batches_again(tmp_path: Path) -> None:
    with pytest.raises(RollbackNeededError):
        spiking(tmp_path).run()
    (tmp_path / rollbacks.FILE).write_text('{"rollbacks": [{', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"rollbacks\.json"):
        spiking(tmp_path).run()


def test_the_record_names_the_batches(tmp_path: Path) -> None:
    with pytest.raises(RollbackNeededError):
        spiking(tmp_path).run()
    (record,) = json.loads((tmp_path / rollbacks.FILE).read_text(encoding="utf-8"))["rollbacks"]
    assert record["window"] == {
        "begin": {"phase": 0, "epoch": 0, "batch_index": 39},
        "end": {"phase": 0, "epoch": 0, "batch_index": 40},
    }


def test_announced_spikes_change_nothing(tmp_path: Path) -> None:
    told = spiking(tmp_path / "a", spikes=SpikePolicy(window_values=32, least_values=16)).run()
    assert {event.step for event in told.named(SpikeDetected)} == {40}
    silent = loop(tmp_path / "b", loader=loader_of(bad_at({40}))).run()
    assert torch.equal(told.weights(), silent.weights())


def test_a_spike_may_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(LossSpikeError) as caught:
        spiking(tmp_path, spikes=SpikePolicy("abort", window_values=32, least_values=16)).run()
    error = caught.value
    assert (error.code, error.exit_code, error.steps_completed) == ("RUNTIME_LOSS_SPIKE", 80, 40)
    assert str(error.checkpoint_path).endswith("step-00000030"), "the newest from before it"


# -- steps that were not finite ------------------------------------------------------------------------------------


def not_finite(run_dir: Path, policy: FinitePolicy, at: set[int], **options: Any) -> Loop:
    loader = loader_of(bad_at(at), math.nan)
    return loop(run_dir, loader=loader, finite=policy, checkpoint_every_steps=10, **options)


def test_too_many_bad_steps_in_a_row_make_a_run_go_back_before_them(tmp_path: Path) -> None:
    policy = FinitePolicy(1, "rollback")
    with pytest.raises(RollbackNeededError) as caught:
        not_finite(tmp_path / "a", policy, {34, 35}).run()
    assert (caught.value.first_step, caught.value.last_step, caught.value.checkpoint_step) == (34, 35, 30)
    again = not_finite(tmp_path / "a", policy, {34, 35}).run()
    assert again.guard.steps_skipped == 0
    reference = loop(tmp_path / "b", loader=LeavingOut({34, 35})).run()
    assert torch.equal(again.weights(), reference.weights())


def test_a_step_seen_too_late_is_taken_back(tmp_path: Path) -> None:
    policy = FinitePolicy(action="rollback", detection="late")
    first = not_finite(tmp_path / "a", policy, {35})
    with pytest.raises(RollbackNeededError):
        first.run()
    assert not first.weights().isfinite().all(), "nobody waited: the step was taken"
    assert not first.named(StepSkipped), "nothing was skipped"
    again = not_finite(tmp_path / "a", policy, {35}).run()
    reference = loop(tmp_path / "b", loader=LeavingOut({35})).run()
    assert torch.equal(again.weights(), reference.weights())


def test_a_step_seen_too_late_ends_the_run_where_the_policy_says_so_and_is_not_saved(tmp_path: Path) -> None:
    policy = FinitePolicy(action="abort", detection="late")
    with pytest.raises(NaNLossError, match="it has reached the weights") as caught:
        not_finite(tmp_path, policy, {35}).run()
    assert caught.value.details["limit"] == "late"
    assert str(caught.value.checkpoint_path).endswith("step-00000030")


def test_nothing_is_remembered_where_no_policy_asks_for_it(tmp_path: Path) -> None:
    guard = Guard(tmp_path, observers=[])
    model = torch.nn.Linear(2, 1)
    with guard.watch(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)):
        assert guard._session is not None
        numbers = guard._session.numbers
        assert (numbers.trail, numbers.values, numbers.detector) == (None, None, None)
