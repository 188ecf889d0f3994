"""The samples of a batch are named by drawing the order of its epoch once more, and nothing else notices."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from trainwarden.runtime.position import DataPosition, capture_streams
from trainwarden.runtime.samples import samples_of


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> int:
        return index


def own_generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


LOADERS: dict[str, Any] = {
    "in order": lambda: DataLoader(Numbers(), batch_size=4),
    "shuffled": lambda: DataLoader(Numbers(), batch_size=4, shuffle=True),
    "shuffled by a generator of its own": lambda: DataLoader(
        Numbers(), batch_size=4, shuffle=True, generator=own_generator()
    ),
    "with replacement": lambda: DataLoader(
        Numbers(), batch_size=4, sampler=RandomSampler(Numbers(), replacement=True, num_samples=20)
    ),
    "weighted": lambda: DataLoader(Numbers(), batch_size=4, sampler=WeightedRandomSampler([1.0] * 23, 20)),
    "a subset": lambda: DataLoader(Numbers(), batch_size=3, sampler=SubsetRandomSampler(range(5, 20))),
    "a batch sampler": lambda: DataLoader(
        Numbers(), batch_sampler=BatchSampler(RandomSampler(Numbers()), 5, drop_last=True)
    ),
    "of one rank": lambda: DataLoader(
        Numbers(), batch_size=2, sampler=DistributedSampler(Numbers(), num_replicas=2, rank=1, seed=3)
    ),
    "sample by sample": lambda: DataLoader(Numbers(), batch_size=None, shuffle=True),
    "dropping the last": lambda: DataLoader(Numbers(), batch_size=4, shuffle=True, drop_last=True),
}


def read(loader: Any, batches: int) -> Iterator[tuple[DataPosition, tuple[int, ...]]]:
    """The position after each batch, and the samples that were really in it."""
    position = DataPosition(loader, say=lambda _text: None)
    for batch in itertools.islice(position, batches):
        yield position, tuple(torch.as_tensor(batch).reshape(-1).tolist())


@pytest.mark.parametrize("name", LOADERS)
def test_the_samples_named_are_those_that_were_read(name: str) -> None:
    torch.manual_seed(1)
    for position, read_samples in read(LOADERS[name](), 14):
        named = samples_of(
            position.loader,
            epoch=position.epoch,
            streams_at_opening=position.streams_at_opening,
            batch_index=position.batch_index - 1,
        )
        assert named == read_samples


@pytest.mark.parametrize("name", LOADERS)
def test_asking_changes_neither_the_order_to_come_nor_any_random_stream(name: str) -> None:
    torch.manual_seed(1)
    undisturbed = [samples for _, samples in read(LOADERS[name](), 14)]
    torch.manual_seed(1)
    seen = []
    for position, samples in read(LOADERS[name](), 14):
        before = capture_streams(position.loader)
        streams = position.streams_at_opening
        samples_of(position.loader, epoch=position.epoch, streams_at_opening=streams, batch_index=0)
        after = capture_streams(position.loader)
        assert torch.equal(before["global"]["torch"], after["global"]["torch"])
        assert all(map(torch.equal, before["generators"], after["generators"]))
        seen.append(samples)
    assert seen == undisturbed


class Remembers(Sampler[int]):
    """Gives out each sample once in its life."""

    def __init__(self) -> None:
        self.left = list(range(23))

    def __iter__(self) -> Iterator[int]:
        while self.left:
            yield self.left.pop()

    def __len__(self) -> int:
        return 23


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


class OwnLoader(DataLoader[int]):
    pass


@pytest.mark.parametrize(
    "loader",
    [
        [torch.zeros(2), torch.zeros(2)],
        DataLoader(Stream(), batch_size=2),
        DataLoader(Numbers(), batch_size=2, sampler=Remembers()),
        OwnLoader(Numbers(), batch_size=2),
    ],
    ids=["a list", "a stream", "a sampler of the user's", "a loader of the user's"],
)
def test_what_cannot_be_asked_again_without_harm_is_not_asked(loader: Any) -> None:
    for position, _ in read(loader, 2):
        streams = position.streams_at_opening
        assert samples_of(loader, epoch=0, streams_at_opening=streams, batch_index=0) is None


def test_a_batch_beyond_the_epoch_has_no_samples() -> None:
    loader = DataLoader(Numbers(), batch_size=4)
    position = DataPosition(loader, say=lambda _text: None)
    next(iter(position))
    streams = position.streams_at_opening
    assert samples_of(loader, epoch=0, streams_at_opening=streams, batch_index=99) is None


def test_an_epoch_that_was_never_opened_has_none_either() -> None:
    assert samples_of(DataLoader(Numbers()), epoch=0, streams_at_opening={}, batch_index=0) is None
