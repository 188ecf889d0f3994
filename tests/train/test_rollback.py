"""Where a loop of one's own ends with an error that a restart resumes, a `Trainer` goes back and on by itself."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.distributed.pool import RankPool
from tests.train import data_parallel_ranks, offload_ranks
from tests.train.tiny import GPT2, LLAMA, distance, identical, instructions, model_weights, settings
from trainwarden import Guard
from trainwarden.errors import GPUMemoryError, NaNLossError, RestartNeededError
from trainwarden.events import Event, MetricsLogged, StepCompleted, WentBack
from trainwarden.runtime.optimizer_step import OptimizerStep
from trainwarden.testing import FailingAllocation, MemoryCeiling
from trainwarden.train import Trainer, rollback
from trainwarden.train.rollback import Beginning, Progress, ReturnPolicy, why_back

ROWS = instructions(24)
DROPOUT = {**GPT2, "resid_pdrop": 0.2}
ASKED = {"max_steps": 7, "max_length": 48, "batch_size": 4}
OWN = ("run_id", "run_dir", "wall_s", "peak_memory_bytes", "checkpoint_path", "model_path", "rollbacks")


def train(model: Any, run_dir: Path, events: list[Event] | None = None, **changes: Any) -> Any:
    observers = [] if events is None else [events.append]
    return Trainer(model, ROWS, output_dir=run_dir, **settings(**{**ASKED, **changes, "observers": observers})).train()


def returns(events: list[Event]) -> list[tuple[int, int]]:
    return [(event.from_step, event.step) for event in events if isinstance(event, WentBack)]


class TearingSteps:
    """Makes chosen calls of ``optimizer.step()``, counted from 1, run out of memory until they cannot be finished."""

    def __init__(self, *calls: int, before: Callable[[], None] = lambda: None) -> None:
        self.calls = calls
        self.count = 0
        self.before = before
        self.original = OptimizerStep.run

    def __call__(self, step: Any, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        if self.count not in self.calls:
            return self.original(step, *args, **kwargs)
        self.before()
        with FailingAllocation(at=1, times=10**6):
            return self.original(step, *args, **kwargs)

    @property
    def run(self) -> Callable[..., Any]:
        """A method, which an instance of this class is not."""

        def run(step: Any, *args: Any, **kwargs: Any) -> Any:
            return self(step, *args, **kwargs)

        return run


@pytest.fixture
def tearing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., TearingSteps]]:
    def tear(*calls: int, **options: Any) -> TearingSteps:
        fault = TearingSteps(*calls, **options)
        monkeypatch.setattr(OptimizerStep, "run", fault.run)
        return fault

    return tear


# -- exactly -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [True, False], ids=["with a checkpoint", "from the beginning"])
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning")
def test_after_a_torn_update_the_run_goes_back_and_ends_bit_identical_to_an_undisturbed_one(
    tmp_path: Path, gpt2_dir: Path, tearing: Any, mode: Any, saved: bool
) -> None:
    asked = {"mode": mode, "lora_dropout": 0.2, "checkpoint_every_steps": 2 if saved else None}
    undisturbed = train(gpt2_dir, tmp_path / "undisturbed", **asked)
    tearing(4)
    events: list[Event] = []
    result = train(gpt2_dir, tmp_path / "torn", events, **asked)
    assert returns(events) == [(3, 2 if saved else 0)]
    assert result.rollbacks == 1
    assert identical(model_weights(tmp_path / "torn"), model_weights(tmp_path / "undisturbed"))
    for name, value in undisturbed.to_dict().items():
        assert name in OWN or result.to_dict()[name] == value, name


def test_steps_that_are_done_again_are_counted_and_logged_once_more(tmp_path: Path, tearing: Any) -> None:
    tearing(6)
    events: list[Event] = []
    train(DROPOUT, tmp_path, events, checkpoint_every_steps=2, log_every_steps=1)
    assert [event.step for event in events if isinstance(event, StepCompleted)] == [1, 2, 3, 4, 5, 5, 6, 7]
    losses = {}
    for event in events:
        if isinstance(event, MetricsLogged):
            assert losses.setdefault(event.step, event.loss) == event.loss


def test_resume_never_is_about_the_start_of_the_training_alone(tmp_path: Path, tearing: Any) -> None:
    train(DROPOUT, tmp_path / "undisturbed")
    tearing(5)
    train(DROPOUT, tmp_path / "torn", checkpoint_every_steps=3, resume="never")
    assert identical(model_weights(tmp_path / "torn"), model_weights(tmp_path / "undisturbed"))


def test_gradients_that_could_not_be_clipped_are_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(DROPOUT, tmp_path / "undisturbed")
    original = Guard.clip_grad_norm_
    calls = 0

    def clip(guard: Guard, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        with FailingAllocation(at=3 if calls == 4 else None, times=10**6):
            return original(guard, *args, **kwargs)

    monkeypatch.setattr(Guard, "clip_grad_norm_", clip)
    result = train(DROPOUT, tmp_path / "failed", checkpoint_every_steps=2)
    assert result.rollbacks == 1
    assert identical(model_weights(tmp_path / "failed"), model_weights(tmp_path / "undisturbed"))


def test_a_pass_over_sharded_weights_that_cannot_be_repeated_is_done_again_in_smaller_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with torch before 2.13, where FSDP is not brought to rest after a failed pass."""
    from trainwarden.runtime.fsdp import ShardedPasses

    asked = {"full_ft_offload": True, "checkpoint_every_steps": 2}
    events: list[Event] = []
    ceiling = MemoryCeiling(2, from_step=4, steps_completed=lambda: max((e.step for e in events), default=0))

    class Squeezed(Trainer):
        def compute_loss(self, model: Any, batch: Any) -> Any:
            return ceiling(lambda part: super(Squeezed, self).compute_loss(model, part))(batch)

    with offload_ranks.gate_open():
        train(LLAMA, tmp_path / "undisturbed", **asked)
        monkeypatch.setattr(ShardedPasses, "can_repeat", False)
        given = settings(**{**ASKED, **asked, "observers": [events.append]})
        result = Squeezed(LLAMA, ROWS, output_dir=tmp_path / "squeezed", **given).train()
    assert returns(events) == [(3, 2)]
    assert result.shrinks == 1
    assert ceiling.struck == 1, "the second time with the smaller plan"
    assert distance(model_weights(tmp_path / "squeezed"), model_weights(tmp_path / "undisturbed")) < 1e-5


def test_ranks_go_back_together_when_one_of_them_cannot_make_an_update(tmp_path: Path, two_ranks: RankPool) -> None:
    asked = settings(**{**ASKED, "batch_size": 2, "checkpoint_every_steps": 2})
    common = {"model": DROPOUT, "rows": ROWS, "settings": asked}
    two_ranks.run(data_parallel_ranks.train, output_dir=tmp_path / "undisturbed", **common)
    found = two_ranks.run(train_torn, output_dir=tmp_path / "torn", at=(1, 4), **common)
    assert [answer["result"].rollbacks for answer in found] == [1, 1]
    assert found[0]["result"] == found[1]["result"]
    assert identical(model_weights(tmp_path / "torn"), model_weights(tmp_path / "undisturbed"))


def test_bad_rows_are_left_out_by_going_back_on_all_ranks_without_a_restart(
    tmp_path: Path, two_ranks: RankPool
) -> None:
    asked = settings(**{**ASKED, "max_steps": 9, "batch_size": 2, "checkpoint_every_steps": 2})
    asked |= {"finite_action": "rollback", "max_skipped_in_a_row": 0}
    found = two_ranks.run(
        data_parallel_ranks.train, model=LLAMA, rows=ROWS, output_dir=tmp_path, settings=asked, bad_rows=(1, 4)
    )
    assert [answer["result"].rollbacks for answer in found] == [1, 1]
    assert [answer["events"].count("RolledBack") for answer in found] == [1, 1]
    assert [answer["result"].steps_completed for answer in found] == [9, 9]
    assert found[0]["result"] == found[1]["result"]
    assert all(torch.isfinite(tensor).all() for tensor in model_weights(tmp_path).values())


def train_torn(rank: int, at: tuple[int, int], **asked: Any) -> dict[str, Any]:
    fault = TearingSteps(*([at[1]] if rank == at[0] else []))
    original = OptimizerStep.run
    OptimizerStep.run = fault.run  # type: ignore[method-assign]
    try:
        return data_parallel_ranks.train(rank, **asked)
    finally:
        OptimizerStep.run = original  # type: ignore[method-assign]


# -- where it ends -------------------------------------------------------------------------------------------------


def test_a_step_that_fails_again_and_again_ends_the_run_after_three_returns(tmp_path: Path, tearing: Any) -> None:
    tearing(4, *range(6, 99, 2))  # from step 2 on each first or second step
    events: list[Event] = []
    with pytest.raises(GPUMemoryError) as caught:
        train(LLAMA, tmp_path, events, checkpoint_every_steps=2)
    assert returns(events) == [(3, 2)] * 3
    assert caught.value.details["phase"] == "optimizer step"
    assert caught.value.checkpoint_path == str(tmp_path / "checkpoints" / "step-00000002")


def test_without_recovery_nothing_is_done_again(tmp_path: Path, tearing: Any) -> None:
    tearing(4)
    with pytest.raises(GPUMemoryError):
        train(LLAMA, tmp_path, oom_recovery=False)


def test_a_stop_that_was_asked_for_is_not_put_off_by_going_back(tmp_path: Path, tearing: Any) -> None:
    tearing(4, before=lambda: os.kill(os.getpid(), signal.SIGTERM))
    events: list[Event] = []
    with pytest.raises(GPUMemoryError) as caught:
        train(LLAMA, tmp_path, events, checkpoint_every_steps=2)
    assert returns(events) == []
    assert caught.value.steps_completed == 3


class SmallHost:
    available_bytes = 1000


def test_what_training_began_with_is_kept_only_where_the_host_has_room(
    tmp_path: Path, tearing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollback.hardware, "host_memory", SmallHost)
    tearing(4)
    with pytest.raises(GPUMemoryError):
        train(LLAMA, tmp_path)


def test_it_is_kept_no_longer_than_until_the_first_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    original = rollback.WayBack.at_boundary

    def at_boundary(way_back: Any) -> None:
        original(way_back)
        kept.append(way_back._beginning is not None)

    monkeypatch.setattr(rollback.WayBack, "at_boundary", at_boundary)
    train(LLAMA, tmp_path, checkpoint_every_steps=3)
    assert kept == [True, True, True, False, False, False, False, False]
    kept.clear()
    train(LLAMA, tmp_path, max_steps=8, accept_changes=["max_steps"])
    assert not any(kept), "a resumed run has its checkpoint"


# -- decisions -----------------------------------------------------------------------------------------------------


def test_only_errors_that_would_not_come_again_send_the_run_back() -> None:
    torn = GPUMemoryError(phase="optimizer step", problem="no memory")
    assert why_back(torn) == torn.message
    assert why_back(GPUMemoryError(phase="gradient clipping", problem="no memory"))
    assert why_back(RestartNeededError(phase="forward", micro_batch_size=2, problem="no memory"))
    assert why_back(GPUMemoryError(phase="forward", problem="one row does not fit")) is None
    assert why_back(NaNLossError(streak=3, skipped=3, what="loss")) is None


@given(steps=st.lists(st.integers(0, 5), max_size=40), most=st.integers(0, 3))
def test_no_run_of_failures_without_progress_is_longer_than_allowed(steps: list[int], most: int) -> None:
    progress, policy = Progress(), ReturnPolicy(max_without_progress=most)
    furthest, since = -1, 0
    for step in steps:
        since = 1 if step > furthest else since + 1
        furthest = max(furthest, step)
        assert progress.may_try(policy, step) == (since <= most)


def test_the_beginning_is_what_the_objects_were(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    beginning = Beginning.keep(model, [optimizer], room_bytes=1000)
    assert beginning is not None
    first = torch.rand(4)
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    beginning.restore()
    assert identical(dict(model.state_dict()), before)
    assert optimizer.state_dict()["state"] == {}
    assert torch.equal(torch.rand(4), first)
    assert Beginning.keep(model, [optimizer], room_bytes=10) is None
