"""A model sharded with FSDP2 under the guard, run inside every rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tests.distributed.loops import OPTIMIZERS, Blocks, Outcome, Plan, disturb
from trainwarden import Guard
from trainwarden.events import Event, MicroBatchShrunk


def train_sharded(rank: int, world_size: int, plan: Plan) -> Outcome:
    model = Blocks()
    mesh = init_device_mesh("cpu", (world_size,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = OPTIMIZERS[plan.optimizer](model.parameters())
    generator = torch.Generator().manual_seed(7)
    data = TensorDataset(torch.randn(plan.rows, 6, generator=generator), torch.randn(plan.rows, 1, generator=generator))
    loader = DataLoader(data, batch_size=plan.batch_size, sampler=DistributedSampler(data, seed=5))
    events: list[Event] = []
    guard = Guard(plan.run_dir, observers=[events.append], rank_deadline_s=60.0, **plan.guard_options)
    disturb(model, plan, rank, guard)

    def compute_loss(batch: Sequence[torch.Tensor]) -> torch.Tensor:
        return functional.mse_loss(model(batch[0]), batch[1])

    losses = []
    with guard.watch(model=model, optimizer=optimizer):
        for batch in guard.batches(loader, max_steps=plan.max_steps):
            losses.append(float(guard.backward(compute_loss, batch)))
            optimizer.step()
            optimizer.zero_grad()
    return Outcome(
        weights=torch.cat([p.full_tensor().detach().reshape(-1) for p in model.parameters()]).double().tolist(),
        losses=losses,
        samples=[],
        shrunk=[(e.from_size, e.to_size, e.reason) for e in events if isinstance(e, MicroBatchShrunk)],
        skipped=[],
        steps_completed=guard.steps_completed,
    )
