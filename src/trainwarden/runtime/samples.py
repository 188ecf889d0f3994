"""Which samples a batch of the past was made of, found by drawing the epoch's order once more; only after an alarm."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from trainwarden.runtime.position import capture_streams, restore_streams

_REPEATABLE = (DistributedSampler, RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler)
"""Samplers of torch that keep nothing from one pass to the next but random streams: asking them again changes nothing.
A sampler of the user's may remember what it gave out, so it is not asked."""


def samples_of(
    loader: Any, *, epoch: int, streams_at_opening: Mapping[str, Any], batch_index: int
) -> tuple[int, ...] | None:
    """Data set indices of the batch ``batch_index`` (from 0) of an epoch; ``None`` where they cannot be told.

    Args:
        loader: as given to ``guard.batches``. Its random streams are where they were afterwards.
        epoch: of the batch; a `DistributedSampler` is asked under the epoch that it has, which must be this one.
        streams_at_opening: the random streams when the epoch's iterator was opened.
        batch_index: takes time in proportion: the order of an epoch is drawn from its beginning.
    """
    if not streams_at_opening or not _can_be_asked_again(loader):
        return None
    now = capture_streams(loader)
    try:
        restore_streams(loader, streams_at_opening)
        if not (loader.persistent_workers and epoch > 0):
            # As torch (2.13) does when it opens an iterator; persistent workers draw their seed once a run.
            torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
        entries = iter(loader.sampler if loader.batch_sampler is None else loader.batch_sampler)
        entry = next(itertools.islice(entries, batch_index, None), None)
    finally:
        restore_streams(loader, now)
    indices: list[Any] = entry if isinstance(entry, list) else [entry]
    return tuple(indices) if all(isinstance(index, int) for index in indices) else None


def _can_be_asked_again(loader: Any) -> bool:
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset):
        return False
    batches = loader.batch_sampler
    sampler = loader.sampler if batches is None else getattr(batches, "sampler", None)
    return type(sampler) in _REPEATABLE and (batches is None or type(batches) is BatchSampler)
