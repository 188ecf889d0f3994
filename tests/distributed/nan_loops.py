"""One non-finite loss or gradient in a training loop, a raw one or that of a `Trainer`, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MethodType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from trainwarden import Guard
from trainwarden.events import Event, MetricsLogged, StepSkipped
from trainwarden.testing import NonFinite

STEPS = 6

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


@dataclass(frozen=True)
class Case:
    """What strikes at ``step`` (from 1) on ``rank``; ``left_out`` runs the same without the fault and that step."""

    run_dir: str
    optimizer: str
    scaler: bool
    what: str
    step: int
    rank: int = 0
    left_out: bool = False

    @property
    def reference(self) -> Case:
        return replace(self, run_dir=f"{self.run_dir}-reference", left_out=True)

    def fault(self, rank: int, steps_completed: Callable[[], int]) -> Callable[[Any], Any]:
        at = {self.step} if rank == self.rank and not self.left_out else set()
        if self.what == "loss":
            return NonFinite(at, what="loss", value=float("nan"), steps_completed=steps_completed)
        return NonFinite(at, what="gradient", value=float("inf"), steps_completed=steps_completed)

    def make_optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        optimizer = OPTIMIZERS[self.optimizer](parameters)
        if self.left_out:
            leave_out(optimizer, self.step)
        return optimizer

    def make_scaler(self) -> torch.amp.GradScaler | None:
        return torch.amp.GradScaler("cpu", init_scale=2.0**10) if self.scaler else None


@dataclass
class Outcome:
    weights: torch.Tensor
    losses: list[float]
    skipped: list[tuple[int, str, str | None, str | None]] = field(default_factory=list)
    """Step, what, tensor and kind of each step that was left out."""
    steps_skipped: int = 0


def leave_out(optimizer: torch.optim.Optimizer, at_step: int) -> None:
    """Makes the call number ``at_step`` (from 1) of the instance's ``step`` do nothing."""
    original, count = optimizer.step, 0

    def step(_optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return None if count == at_step else original(*args, **kwargs)

    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign, assignment]


def skips(events: list[Event]) -> list[tuple[int, str, str | None, str | None]]:
    return [(e.step, e.what, e.tensor, e.kind) for e in events if isinstance(e, StepSkipped)]


def raw(rank: int, case: Case) -> Outcome:
    """The loop of a user; under DDP where there are several ranks."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    torch.manual_seed(3)
    bare = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    model: Any = DistributedDataParallel(bare) if several else bare
    optimizer, scaler = case.make_optimizer(bare.parameters()), case.make_scaler()
    generator = torch.Generator().manual_seed(7)
    data = TensorDataset(torch.randn(96, 6, generator=generator), torch.randn(96, 1, generator=generator))
    sampler = DistributedSampler(data, seed=5) if several else None
    events: list[Event] = []
    guard = Guard(case.run_dir, observers=[events.append], rank_deadline_s=60.0)
    loss_of = case.fault(rank, lambda: guard.steps_completed)(
        lambda batch: functional.mse_loss(model(batch[0]), batch[1])
    )
    losses = []
    with guard.watch(model=model, optimizer=optimizer, scaler=scaler):
        for batch in guard.batches(DataLoader(data, batch_size=8, sampler=sampler), max_steps=STEPS):
            losses.append(float(guard.backward(loss_of, batch)))
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
    weights = torch.cat([p.detach().reshape(-1) for p in bare.parameters()])
    return Outcome(weights, losses, skips(events), guard.steps_skipped)


def trainer(rank: int, case: Case) -> Outcome:
    """The same in a `Trainer`; an optimizer and a scaler are put in the place of its own. Rank 0 has the weights."""
    from tests.train.data_parallel_ranks import launched
    from tests.train.tiny import LLAMA, instructions, model_weights, settings
    from trainwarden.train import Trainer, loop, processes

    steps = 0
    events: list[Event] = []

    def count(event: Event) -> None:
        nonlocal steps
        steps = event.step
        events.append(event)

    class Faulty(Trainer):
        def compute_loss(self, model: Any, batch: Any) -> Any:
            return case.fault(rank, lambda: steps)(lambda b: super(Faulty, self).compute_loss(model, b))(batch)

    asked = settings(max_steps=STEPS, log_every_steps=1, learning_rate=1e-3, schedule="constant", observers=[count])
    made = Faulty(LLAMA, instructions(24), output_dir=case.run_dir, **asked)
    scaler = case.make_scaler()
    several = dist.is_initialized() and dist.get_world_size() > 1
    with (
        launched(rank) if several else nullcontext(),
        mock.patch.object(loop, "build_adamw", lambda model, **_options: case.make_optimizer(model.parameters())),
        mock.patch.object(processes.DataParallel, "scaler", scaler),
    ):
        result = made.train()
    weights = model_weights(Path(case.run_dir)) if rank == 0 else {"none": torch.ones(1)}
    logged = [event.loss for event in events if isinstance(event, MetricsLogged)]
    flat = torch.cat([weights[name].reshape(-1) for name in sorted(weights)])
    return Outcome(flat, logged, skips(events), result.steps_skipped)
