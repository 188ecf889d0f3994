"""A DDP loop whose data cannot all be read, run inside every rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from tests.distributed.loops import Blocks
from trainwarden import DataPolicy, Guard, skip_unreadable
from trainwarden.runs import Ledger


@dataclass(frozen=True)
class BadPlan:
    """``bad`` are the samples that cannot be read; ``breaks_off``: (rank, batch) at which that rank's stream ends."""

    run_dir: str
    bad: tuple[int, ...] = ()
    samples: bool = False
    breaks_off: tuple[int, int] | None = None
    max_steps: int = 6
    rows: int = 64
    policy: DataPolicy = field(default_factory=DataPolicy)
    checkpoint_every_steps: int | None = None


@dataclass
class BadOutcome:
    weights: list[float]
    samples: list[int]
    steps_completed: int
    left_out: int
    in_ledger: int | None


class Rows(Dataset[Any]):
    def __init__(self, plan: BadPlan) -> None:
        generator = torch.Generator().manual_seed(7)
        self.inputs = torch.randn(plan.rows, 6, generator=generator)
        self.targets = torch.randn(plan.rows, 1, generator=generator)
        self.bad = plan.bad

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Any:
        if index in self.bad:
            return float(f"not a number: {index}")
        return self.inputs[index], self.targets[index], index


class Stream(IterableDataset[Any]):
    """A generator, so that an error ends it."""

    def __init__(self, plan: BadPlan, rank: int) -> None:
        self.rows = Rows(plan)
        self.rank = rank
        self.breaks_at = plan.breaks_off[1] * 4 if plan.breaks_off and plan.breaks_off[0] == rank else None

    def __iter__(self) -> Iterator[Any]:
        for index in range(self.rank, len(self.rows), 2):
            if index // 2 == self.breaks_at:
                float("the connection is gone")
            yield self.rows[index]


def train(rank: int, plan: BadPlan) -> BadOutcome:
    model = Blocks()
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-2)
    loader: DataLoader[Any]
    if plan.breaks_off:
        loader = DataLoader(Stream(plan, rank), batch_size=4)
    else:
        data: Any = Rows(plan)
        sampler: Any = DistributedSampler(data, seed=5, shuffle=False)
        loader = DataLoader(skip_unreadable(data) if plan.samples else data, batch_size=4, sampler=sampler)
    guard = Guard(
        plan.run_dir,
        observers=[],
        rank_deadline_s=60.0,
        data=plan.policy,
        checkpoint_every_s=None,
        checkpoint_every_steps=plan.checkpoint_every_steps,
    )
    samples: list[int] = []
    with guard.watch(model=ddp, optimizer=optimizer):
        for batch in guard.batches(loader, max_steps=plan.max_steps):
            samples += batch[2].tolist()
            guard.backward(lambda part: functional.mse_loss(ddp(part[0]), part[1]), batch)
            optimizer.step()
            optimizer.zero_grad()
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double().tolist()
    in_ledger = Ledger().find(plan.run_dir).data_skipped if rank == 0 else None
    return BadOutcome(weights, samples, guard.steps_completed, guard.data_skipped, in_ledger)
