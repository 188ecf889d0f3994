"""The data position: the rest of an epoch after a resume is the rest that would have come."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
)

from tests.runtime.loops import Rows
from trainwarden.errors import DatasetError, InvalidSettingError
from trainwarden.runtime.position import DataPosition, rescaled


def take(position: DataPosition, count: int) -> list[Any]:
    stream = iter(position)
    return [next(stream) for _ in range(count)]


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def flatten(batches: list[Any]) -> torch.Tensor:
    return torch.cat([torch.as_tensor(b[0] if isinstance(b, (tuple, list)) else b).reshape(-1) for b in batches])


class Stream(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from (torch.rand(2) for _ in range(20))


class LazyRandom(Sampler[int]):
    """Draws each index from the global generator when it is asked for it."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(24):
            yield random.randrange(24)

    def __len__(self) -> int:
        return 24


LOADERS: dict[str, Any] = {
    "shuffled": lambda: DataLoader(Rows(24), batch_size=4, shuffle=True),
    "shuffled, sample noise": lambda: DataLoader(Rows(24, noise=True), batch_size=4, shuffle=True),
    "own generator": lambda: DataLoader(
        Rows(24), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5)
    ),
    "drop last": lambda: DataLoader(Rows(22), batch_size=4, shuffle=True, drop_last=True),
    "sequential": lambda: DataLoader(Rows(24), batch_size=4),
    "weighted": lambda: DataLoader(Rows(24), batch_size=4, sampler=WeightedRandomSampler(torch.ones(24), 24)),
    "with replacement": lambda: DataLoader(Rows(24), batch_size=4, sampler=RandomSampler(Rows(24), True, 24)),
    "lazy sampler": lambda: DataLoader(Rows(24), batch_size=4, sampler=LazyRandom()),
    "batch sampler": lambda: DataLoader(
        Rows(24), batch_sampler=BatchSampler(RandomSampler(Rows(24)), 5, drop_last=False)
    ),
    "no automatic batches": lambda: DataLoader(Rows(24), batch_size=None, shuffle=True),
    "iterable data set": lambda: DataLoader(Stream(), batch_size=4),
    "list": lambda: [torch.tensor([float(i)]) for i in range(6)],
}


@pytest.mark.parametrize("name", LOADERS)
@settings(max_examples=12, deadline=None)
@given(before=st.integers(0, 15), seed=st.integers(0, 1000))
def test_what_follows_a_resume_is_what_would_have_followed(name: str, before: int, seed: int) -> None:
    seed_everything(seed)
    uninterrupted = DataPosition(LOADERS[name](), say=lambda _: None)
    stream = iter(uninterrupted)
    for _ in range(before):
        next(stream)
        torch.rand(1)  # the training step draws too
    state = uninterrupted.state_dict() if before else None
    expected = [next(stream) for _ in range(12)]
    draws_expected = (torch.rand(1).item(), random.random())

    seed_everything(seed if state is None else seed + 1)
    resumed = DataPosition(LOADERS[name](), say=lambda _: None)
    if state is not None:
        resumed.load_state_dict(state)
    found = take(resumed, 12)
    assert torch.equal(flatten(found), flatten(expected))
    assert (torch.rand(1).item(), random.random()) == draws_expected
    assert (resumed.epoch, resumed.batch_index) == (uninterrupted.epoch, uninterrupted.batch_index)


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("before", [3, 8])
def test_order_and_samples_are_the_same_with_worker_processes(persistent: bool, before: int) -> None:
    def loader() -> DataLoader[Any]:
        return DataLoader(Rows(24), batch_size=4, shuffle=True, num_workers=2, persistent_workers=persistent)

    seed_everything(1)
    uninterrupted = DataPosition(loader(), say=lambda _: None)
    stream = iter(uninterrupted)
    for _ in range(before):
        next(stream)
    state = uninterrupted.state_dict()
    expected = [next(stream) for _ in range(9)]
    seed_everything(2)
    said: list[str] = []
    resumed = DataPosition(loader(), say=said.append)
    resumed.load_state_dict(state)
    assert torch.equal(flatten(take(resumed, 9)), flatten(expected))
    assert "augmentation inside worker processes" in said[0]


def test_a_map_style_position_is_found_without_loading_the_samples_before_it() -> None:
    data = Rows(10_000)
    position = DataPosition(DataLoader(data, batch_size=4, shuffle=True), say=lambda _: None)
    stream = iter(position)
    next(stream)
    state = {**position.state_dict(), "batch_index": 2400}
    data.loaded.clear()
    resumed = DataPosition(DataLoader(data, batch_size=4, shuffle=True), say=lambda _: None)
    resumed.load_state_dict(state)
    take(resumed, 1)
    assert len(data.loaded) == 4


def test_a_loader_with_state_is_asked_for_it_and_given_it_back() -> None:
    class Stateful:
        def __init__(self) -> None:
            self.at = 0

        def __iter__(self) -> Iterator[int]:
            while self.at < 10:
                self.at += 1
                yield self.at
            self.at = 0

        def state_dict(self) -> dict[str, int]:
            return {"at": self.at}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.at = state["at"]

    position = DataPosition(Stateful(), say=lambda _: None)
    assert take(position, 4) == [1, 2, 3, 4]
    resumed = DataPosition(Stateful(), say=lambda _: None)
    resumed.load_state_dict(position.state_dict())
    assert take(resumed, 8) == [5, 6, 7, 8, 9, 10, 1, 2]


def test_reading_again_to_find_the_position_is_announced() -> None:
    class Plain:
        def __iter__(self) -> Iterator[int]:
            return iter(range(10))

    position = DataPosition(Plain(), say=lambda _: None)
    take(position, 4)
    said: list[str] = []
    resumed = DataPosition(Plain(), say=said.append)
    resumed.load_state_dict(position.state_dict())
    assert take(resumed, 2) == [4, 5]
    assert "reading 4 batches again" in said[0]


def test_epochs_are_told_to_the_sampler() -> None:
    class Epochs(Sampler[int]):
        seen: list[int] = []  # noqa: RUF012 - read by the test

        def set_epoch(self, epoch: int) -> None:
            self.seen.append(epoch)

        def __iter__(self) -> Iterator[int]:
            return iter(range(4))

        def __len__(self) -> int:
            return 4

    position = DataPosition(DataLoader(Rows(4), batch_size=2, sampler=Epochs()), say=lambda _: None)
    take(position, 5)
    assert Epochs.seen == [0, 1, 2]


def test_a_spent_once_iterator_is_refused_at_once() -> None:
    with pytest.raises(InvalidSettingError, match="iterated again"):
        DataPosition(iter([1, 2]), say=lambda _: None)


def test_an_epoch_without_a_batch_is_an_error_not_an_endless_loop() -> None:
    with pytest.raises(DatasetError, match="no batch"):
        take(DataPosition([], say=lambda _: None), 1)


@given(batch_index=st.integers(0, 500), before=st.integers(1, 500), now=st.integers(1, 500))
def test_another_number_of_ranks_continues_at_the_same_part_of_the_epoch(
    batch_index: int, before: int, now: int
) -> None:
    batch_index = min(batch_index, before)
    found = rescaled({"batch_index": batch_index, "batches": before}, now)["batch_index"]
    assert 0 <= found <= now
    assert found - 1 < batch_index * now / before <= found


def test_a_position_without_a_length_is_taken_as_it_is() -> None:
    position = {"batch_index": 7, "batches": None}
    assert rescaled(position, 20) == position
    assert rescaled({"batch_index": 7, "batches": 9}, None)["batch_index"] == 7


@pytest.mark.parametrize(
    "loader", [DataLoader(Rows(10), batch_size=2, shuffle=True), [1, 2, 3, 4, 5]], ids=["loader", "list"]
)
def test_a_position_from_before_the_first_batch_begins_at_the_beginning(loader: Any) -> None:
    torch.manual_seed(5)
    position = DataPosition(loader, say=lambda _: None)
    state = position.state_dict()
    first = [str(batch) for batch in take(position, 7)]
    torch.manual_seed(99)
    again = DataPosition(loader, say=lambda _: None)
    again.load_state_dict(state)
    assert [str(batch) for batch in take(again, 7)] == first


def test_batches_that_are_left_out_are_read_and_dropped() -> None:
    position = DataPosition([1, 2, 3, 4, 5], say=lambda _: None)
    position.leave_out = lambda epoch, index: (epoch, index) in {(0, 1), (0, 2), (1, 0), (1, 4)}
    assert take(position, 7) == [1, 4, 5, 2, 3, 4, 1]
    assert (position.epoch, position.batch_index) == (2, 1)
