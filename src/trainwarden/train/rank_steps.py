"""What each rank of a run does of an optimizer step: disjoint rows of one order, weighed by the targets of all ranks.

All ranks open the same loader, so they agree on the rows of a step without a word; rank ``r`` takes those at ``r``,
``r + world_size`` and so on. Every rank runs the same number of micro-batches, for each is a collective of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from trainwarden.runtime.split import shifted_target_tokens
from trainwarden.train.data import Batch, EncodedDataset, collate, micro_batches
from trainwarden.train.encode import IGNORED, Encoded


@dataclass(frozen=True)
class RankStep:
    """One rank's part of an optimizer step.

    ``shares[i]`` is what the targets of ``batches[i]`` are of those of all ranks; 0 for a batch that is only there so
    that this rank runs as many as the others. ``tokens`` counts those of all ranks, without padding.
    """

    batches: list[Batch]
    shares: list[float]
    tokens: int


class RankStepCollator:
    """Collates the rows of one optimizer step of all ranks into what this rank does of it."""

    def __init__(self, *, rank: int, world_size: int, micro_batch_size: int, pad_token_id: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.micro_batch_size = micro_batch_size
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[Encoded]) -> RankStep:
        own = rows[self.rank :: self.world_size]
        batches = micro_batches(own, micro_batch_size=self.micro_batch_size, pad_token_id=self.pad_token_id)
        targets = sum(targets_of(row) for row in rows)
        shares = [shifted_target_tokens(batch) / targets for batch in batches]
        most_rows = -(-len(rows) // self.world_size)
        missing = -(-most_rows // self.micro_batch_size) - len(batches)
        batches.extend([collate(rows[:1], pad_token_id=self.pad_token_id)] * missing)
        return RankStep(batches, shares + [0.0] * missing, sum(len(row.input_ids) for row in rows))


def targets_of(row: Encoded) -> int:
    """How many tokens of a row the loss is a mean over."""
    return sum(label != IGNORED for label in row.labels[1:])  # a causal model predicts from the second token on


def rank_loader(
    dataset: EncodedDataset,
    *,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    grad_accum_steps: int,
    pad_token_id: int,
    seed: int,
) -> DataLoader[Any]:
    """A shuffled loader that yields a `RankStep` for each optimizer step: the same order and steps on every rank.

    A step takes ``world_size`` × ``micro_batch_size`` × ``grad_accum_steps`` rows; with one rank they come in the order
    and the micro-batches of `training_loader`.
    """
    collator = RankStepCollator(
        rank=rank, world_size=world_size, micro_batch_size=micro_batch_size, pad_token_id=pad_token_id
    )
    return DataLoader(
        dataset,
        batch_size=world_size * micro_batch_size * grad_accum_steps,
        shuffle=True,
        collate_fn=collator,
        generator=torch.Generator().manual_seed(seed),
    )
