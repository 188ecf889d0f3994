"""A loop under DDP that spikes, and goes back in place until it is through or may not any more."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from trainwarden import Guard
from trainwarden.errors import RollbackNeededError
from trainwarden.events import Event, RolledBack, StepSkipped
from trainwarden.guards.finite import FinitePolicy
from trainwarden.guards.rollback import RollbackPolicy
from trainwarden.guards.spikes import SpikePolicy

STEPS = 40


@dataclass(frozen=True)
class Plan:
    run_dir: str
    bad: tuple[int, float] | None = None
    """A sample and its target, which only one rank reads."""
    leave_out: int | None = None
    """A step (from 1) whose batch the loop drops by itself."""
    on_spike: bool = True
    restart: bool = False
    """Whether a return leaves the function, as it leaves a process."""


@dataclass
class Outcome:
    weights: torch.Tensor
    came_back: int
    steps_completed: int
    rolled_back: list[int] = field(default_factory=list)
    skipped: int = 0


def _policies(plan: Plan) -> dict[str, object]:
    if plan.on_spike:
        return {"spikes": SpikePolicy("rollback", window_values=16, least_values=8)}
    return {"finite": FinitePolicy(0, "rollback")}


def train(rank: int, plan: Plan) -> Outcome:
    torch.manual_seed(3)
    bare = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    model = DistributedDataParallel(bare)
    optimizer = torch.optim.AdamW(bare.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(7)
    inputs, targets = torch.randn(512, 6, generator=generator), torch.randn(512, 1, generator=generator)
    if plan.bad is not None:
        targets[plan.bad[0]] = plan.bad[1]
    data = TensorDataset(inputs, targets)
    events: list[Event] = []
    guard = Guard(
        plan.run_dir,
        observers=[events.append],
        rank_deadline_s=60.0,
        checkpoint_every_steps=10,
        rollback=RollbackPolicy(skip_steps_before=0),
        **_policies(plan),  # type: ignore[arg-type]
    )
    came_back = 0
    while True:
        sampler = DistributedSampler(data, shuffle=False)
        try:
            with guard.watch(model=model, optimizer=optimizer):
                for index, batch in enumerate(guard.batches(DataLoader(data, 4, sampler=sampler), max_steps=STEPS)):
                    if plan.leave_out is not None and index + 1 == plan.leave_out:
                        continue
                    guard.backward(lambda b: functional.mse_loss(model(b[0]), b[1]), batch)
                    optimizer.step()
                    optimizer.zero_grad()
            break
        except RollbackNeededError:
            if plan.restart:
                raise
            came_back += 1
    return Outcome(
        torch.cat([p.detach().reshape(-1) for p in bare.parameters()]),
        came_back,
        guard.steps_completed,
        [event.step for event in events if isinstance(event, RolledBack)],
        sum(isinstance(event, StepSkipped) for event in events),
    )
