"""What docs/exactness.md states about splits, retries and random streams."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.runtime.loops import ComputeLoss, Loop, Rows, distance
from trainwarden import Guard
from trainwarden.events import MemoryRemedyApplied, MicroBatchShrunk
from trainwarden.testing import MemoryCeiling, out_of_memory_error

TWO_EPOCHS = 20


def split_at_step(step: int) -> Callable[[ComputeLoss, Guard], ComputeLoss]:
    def disturb(compute_loss: ComputeLoss, guard: Guard) -> ComputeLoss:
        ceiling = MemoryCeiling(4, from_step=step, steps_completed=lambda: guard.steps_completed)
        return ceiling(compute_loss)

    return disturb


def run(run_dir: Path, *, dropout: float, disturb: Any = None, own_generator: bool = False) -> tuple[list[int], Loop]:
    """The order of samples over two epochs, and the loop."""
    data = Rows()
    generator = torch.Generator().manual_seed(9) if own_generator else None
    loader = DataLoader(data, batch_size=8, shuffle=True, generator=generator)
    loop = Loop(run_dir, max_steps=TWO_EPOCHS, dropout=dropout, disturb=disturb, loader=loader).run()
    return data.loaded, loop


def test_splits_leave_the_order_of_the_data_as_it_was_where_the_loss_draws_nothing(tmp_path: Path) -> None:
    order, whole = run(tmp_path / "a", dropout=0.0)
    same, split = run(tmp_path / "b", dropout=0.0, disturb=split_at_step(4))
    assert same == order
    assert distance(split.weights(), whole.weights()) < 1e-5


def test_with_a_generator_of_its_own_the_loader_keeps_its_order_whatever_the_loss_draws(tmp_path: Path) -> None:
    order, _ = run(tmp_path / "a", dropout=0.3, own_generator=True)
    same, split = run(tmp_path / "b", dropout=0.3, own_generator=True, disturb=split_at_step(4))
    assert split.named(MicroBatchShrunk)
    assert same == order


def test_where_loss_and_order_share_a_generator_the_next_epoch_may_be_ordered_otherwise_but_stays_whole(
    tmp_path: Path,
) -> None:
    order, _ = run(tmp_path / "a", dropout=0.3)
    other, _ = run(tmp_path / "b", dropout=0.3, disturb=split_at_step(4))
    assert other[:80] == order[:80], "an epoch that is open keeps its order"
    assert sorted(other[80:]) == sorted(order[80:]), "and every epoch has every sample once"


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_retry_of_the_same_size_is_the_step_that_did_not_fail(tmp_path: Path, dropout: float) -> None:
    """Returning the cache is enough here: random state and gradients are as if nothing had happened."""
    calls = itertools.count()

    def disturb(compute_loss: ComputeLoss, guard: Guard) -> ComputeLoss:
        def limited(batch: Any) -> torch.Tensor:
            loss = compute_loss(batch)  # has drawn its masks
            if next(calls) == 5:
                raise torch.OutOfMemoryError(
                    f"{out_of_memory_error(2**30, 2**29)} Of the allocated memory 70.00 GiB is allocated by PyTorch, "
                    "and 600.00 MiB is reserved by PyTorch but unallocated."
                )
            return loss

        return limited

    order, whole = run(tmp_path / "a", dropout=dropout)
    same, retried = run(tmp_path / "b", dropout=dropout, disturb=disturb)
    assert len(retried.named(MemoryRemedyApplied)) == 1
    assert same == order
    assert torch.equal(retried.weights(), whole.weights())


def test_a_whole_batch_retried_in_parts_starts_from_the_random_state_of_its_first_attempt(tmp_path: Path) -> None:
    """How often it failed before does not show: the run that shrinks twice is the one that knew the size before."""

    def weights(run_dir: Path, known: int | None) -> torch.Tensor:
        loop = Loop(
            run_dir, dropout=0.3, max_steps=1, disturb=lambda compute_loss, guard: MemoryCeiling(2)(compute_loss)
        )
        loop.guard._progress.plan.limit = known
        loop.run()
        return loop.weights()

    assert torch.equal(weights(tmp_path / "a", None), weights(tmp_path / "b", 2))


def test_a_resumed_run_splits_as_the_uninterrupted_one_would_have(tmp_path: Path) -> None:
    class StoppedError(Exception):
        pass

    def stop(guard: Guard) -> None:
        if guard.steps_completed == 7:
            raise StoppedError

    def sizes(run_dir: Path, **options: Any) -> tuple[list[int], torch.Tensor]:
        seen: list[int] = []

        def disturb(compute_loss: ComputeLoss, guard: Guard) -> ComputeLoss:
            def noted(batch: Any) -> torch.Tensor:
                if torch.is_grad_enabled():
                    seen.append(len(batch[0]))
                return compute_loss(batch)

            return MemoryCeiling(5, from_step=3, steps_completed=lambda: guard.steps_completed)(noted)

        loop = Loop(run_dir, batch_size=16, disturb=disturb, guard_options={"checkpoint_every_steps": 1}, **options)
        with contextlib.suppress(StoppedError):
            loop.run()
        return seen, loop.weights()

    whole, weights = sizes(tmp_path / "a")
    before, _ = sizes(tmp_path / "b", after_step=stop)
    after, resumed = sizes(tmp_path / "b")
    assert torch.equal(resumed, weights)
    assert after == whole[-len(after) :]
    assert len(before) > len(whole) - len(after) - 8
