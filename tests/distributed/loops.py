"""A training loop under the guard, with DDP on several ranks, run inside every rank: faults strike chosen ones."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from trainwarden import Guard
from trainwarden.events import Event, MicroBatchShrunk, StepSkipped
from trainwarden.runtime.exchange import GradientExchange
from trainwarden.testing import FailingAllocation, out_of_memory_error

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


@dataclass(frozen=True)
class Strike:
    """Where memory runs out on one rank: above ``rows`` rows, from ``step`` (from 1) on, ``times`` times."""

    rank: int
    step: int
    phase: Literal["load", "forward", "backward", "clip", "optimizer step", "evaluation", "checkpoint"]
    layer: int = 0
    """Before which of the model's blocks; in backward the blocks above it have their gradients by then. In loading, the
    clip, the optimizer step and the evaluation: which allocation fails, from 1. A checkpoint fails once."""
    rows: int = 2
    times: int | None = None
    fatal: bool = False
    """In the clip and the optimizer step: whether every later allocation fails too."""


@dataclass(frozen=True)
class Plan:
    """What every rank runs."""

    run_dir: str
    max_steps: int = 6
    rows: int = 64
    batch_size: int = 4
    accumulate: int = 1
    optimizer: str = "adamw"
    strikes: tuple[Strike, ...] = ()
    poison: tuple[tuple[int, int], ...] = ()
    """(rank, step) whose loss is NaN."""
    stop: tuple[int, int] | None = None
    """(rank, step) at which that rank sends itself SIGTERM."""
    kill: tuple[int, int] | None = None
    guarded: bool = True
    guard_options: dict[str, Any] = field(default_factory=dict)
    bucket_bytes: int = 400
    """Small ones, so that some are on their way when memory runs out in the middle of a backward pass."""
    unused: bool = False
    normalised: bool = False
    scheduled: bool = True
    max_norm: float | None = None
    evaluates: bool = False
    """Whether every rank evaluates a few rows of its own before each step."""
    launched: bool = True
    """Whether a single rank uses DDP too."""


@dataclass
class Outcome:
    weights: list[float]
    losses: list[float]
    samples: list[int]
    """Indices of the samples this rank was given, in order."""
    shrunk: list[tuple[int, int, str]]
    skipped: list[int]
    steps_completed: int
    struck: int = 0
    """Allocations outside forward and backward that failed."""
    evaluations: list[float] = field(default_factory=list)


class Blocks(nn.Module):
    """A few layers, with a place to fail before each; ``unused`` adds one that no loss depends on."""

    def __init__(self, unused: bool = False, normalised: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList([nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 1)])
        self.norm = nn.BatchNorm1d(6) if normalised else nn.Identity()
        self.spare = nn.Linear(3, 3) if unused else None
        self.fault: Callable[[int, torch.Tensor], torch.Tensor] = lambda _layer, x: x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        for index, layer in enumerate(self.layers):
            x = layer(torch.tanh(self.fault(index, x)) if index else self.fault(index, x))
        return x


class _FailInBackward(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, *_gradients: torch.Tensor) -> torch.Tensor:
        raise out_of_memory_error()


class Greedy:
    """State of a user's own, which takes memory that is not there when the strike's checkpoint is taken."""

    def __init__(self, plan: Plan, rank: int, guard: Guard) -> None:
        self.steps = [s.step for s in plan.strikes if (s.rank, s.phase) == (rank, "checkpoint")]
        self.guard = guard
        self.struck = 0

    def state_dict(self) -> dict[str, Any]:
        if self.guard.steps_completed in self.steps[self.struck :]:
            self.struck += 1
            raise out_of_memory_error()
        return {"kept": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state == {"kept": 1}


def replicated(model: nn.Module, plan: Plan) -> nn.Module:
    """The model as one of several ranks trains it, or as one process does, which a launcher may have started."""
    if dist.get_world_size() == 1 and not plan.launched:
        return model
    return DistributedDataParallel(model, find_unused_parameters=plan.unused)


def train(rank: int, plan: Plan) -> Outcome:
    """The loop of a user of DDP."""
    GradientExchange.__init__.__defaults__ = (plan.bucket_bytes,)  # type: ignore[misc]
    events: list[Event] = []
    guard = Guard(plan.run_dir, observers=[events.append], rank_deadline_s=60.0, **plan.guard_options)
    loading = [failing(plan, rank, strike.step, "load") for strike in plan.strikes if strike.phase == "load"]

    def load() -> Blocks:
        with loading[0] if loading else FailingAllocation():
            return Blocks(plan.unused, plan.normalised)

    model = guard.attempt("load", load)
    ddp: Any = replicated(model, plan)
    optimizer = OPTIMIZERS[plan.optimizer](ddp.parameters())
    scheduler = _schedule(optimizer, plan)
    generator = torch.Generator().manual_seed(7)
    data = TensorDataset(
        torch.randn(plan.rows, 6, generator=generator),
        torch.randn(plan.rows, 1, generator=generator),
        torch.arange(plan.rows),
    )
    loader = DataLoader(data, batch_size=plan.batch_size, sampler=DistributedSampler(data, seed=5))
    losses: list[float] = []
    samples: list[int] = []
    evaluations: list[float] = []
    held_back = [(torch.ones(3, 6) * (rank + 1) / row, torch.zeros(3, 1)) for row in (1, 2)]
    struck = sum(fault.struck for fault in loading)
    greedy = Greedy(plan, rank, guard)
    disturb(model, plan, rank, guard)

    def compute_loss(batch: Sequence[torch.Tensor]) -> torch.Tensor:
        loss = functional.mse_loss(ddp(batch[0]), batch[1]) / plan.accumulate
        return loss * float("nan") if (rank, guard.steps_completed + 1) in plan.poison else loss

    def score(batch: Sequence[torch.Tensor]) -> torch.Tensor:
        return functional.mse_loss(model(batch[0]), batch[1])

    with guard.watch(model=ddp, optimizer=optimizer, scheduler=scheduler, greedy=greedy):
        for index, batch in enumerate(guard.batches(loader, max_steps=plan.max_steps)):
            step = guard.steps_completed + 1
            if (rank, step) == plan.stop:
                os.kill(os.getpid(), signal.SIGTERM)
            if (rank, step) == plan.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            samples += batch[2].tolist()
            if plan.evaluates:
                with failing(plan, rank, step, "evaluation") as fault:
                    evaluations.append(float(guard.evaluate(score, held_back)))  # type: ignore[arg-type]
                struck += fault.struck
            if (index + 1) % plan.accumulate:
                with ddp.no_sync() if ddp is not model else nullcontext():
                    losses.append(float(guard.backward(compute_loss, batch)))
                continue
            losses.append(float(guard.backward(compute_loss, batch)))
            if plan.max_norm is not None:
                with failing(plan, rank, step, "clip") as fault:
                    guard.clip_grad_norm_(ddp.parameters(), plan.max_norm)
                struck += fault.struck
            with failing(plan, rank, step, "optimizer step") as fault:
                optimizer.step()
            struck += fault.struck
            scheduler.step()
            optimizer.zero_grad()
    return Outcome(
        weights=torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double().tolist(),
        losses=losses,
        samples=samples,
        shrunk=[(e.from_size, e.to_size, e.reason) for e in events if isinstance(e, MicroBatchShrunk)],
        skipped=[e.step for e in events if isinstance(e, StepSkipped)],
        steps_completed=guard.steps_completed,
        struck=struck + greedy.struck,
        evaluations=evaluations,
    )


def train_lengths(rank: int, run_dir: str, lengths: Sequence[Sequence[int]], most_tokens: int) -> dict[str, Any]:
    """One step for each length of this rank, over 4 rows of it; on rank 0 more than ``most_tokens`` do not fit.

    ``parts`` are the rows that each batch was trained in at last.
    """
    model = Blocks()
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(rank)
    batches = [torch.randn(4, length, 6, generator=generator) for length in lengths[rank]]
    guard = Guard(run_dir, observers=[], rank_deadline_s=60.0)
    parts: list[list[int]] = []
    thrown = 0

    def compute_loss(batch: torch.Tensor) -> torch.Tensor:
        nonlocal thrown
        if rank == 0 and torch.is_grad_enabled() and batch.shape[0] * batch.shape[1] > most_tokens:
            thrown += 1
            parts[-1].clear()
            raise out_of_memory_error()
        if torch.is_grad_enabled():
            parts[-1].append(batch.shape[0])
        return ddp(batch.tanh()).square().mean()

    with guard.watch(model=ddp, optimizer=optimizer):
        for batch in guard.batches(batches, max_steps=len(batches)):
            parts.append([])
            guard.backward(compute_loss, batch)
            optimizer.step()
            optimizer.zero_grad()
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double().tolist()
    return {"weights": weights, "parts": parts, "thrown": thrown}


def failing(plan: Plan, rank: int, step: int, phase: str) -> FailingAllocation:
    """What makes an allocation of this phase fail, if a strike of this rank says so."""
    due = [s for s in plan.strikes if (s.rank, s.phase) == (rank, phase) and (s.step == step or s.times is None)]
    strike = due[0] if due and step >= due[0].step else None
    return FailingAllocation(at=strike.layer, times=10**6 if strike.fatal else 1) if strike else FailingAllocation()


def plain(rank: int, plan: Plan) -> list[float]:
    """The same loop without a guard, on DDP's own reducer."""
    model = Blocks(plan.unused, plan.normalised)
    ddp: Any = replicated(model, plan)
    optimizer = OPTIMIZERS[plan.optimizer](ddp.parameters())
    scheduler = _schedule(optimizer, plan)
    generator = torch.Generator().manual_seed(7)
    data = TensorDataset(torch.randn(plan.rows, 6, generator=generator), torch.randn(plan.rows, 1, generator=generator))
    sampler: DistributedSampler[Any] = DistributedSampler(data, seed=5)
    loader = DataLoader(data, batch_size=plan.batch_size, sampler=sampler)
    step = epoch = 0
    while step < plan.max_steps:
        sampler.set_epoch(epoch)
        for index, (x, y) in enumerate(loader):
            if (index + 1) % plan.accumulate:
                with ddp.no_sync() if ddp is not model else nullcontext():
                    (functional.mse_loss(ddp(x), y) / plan.accumulate).backward()
                continue
            (functional.mse_loss(ddp(x), y) / plan.accumulate).backward()
            if plan.max_norm is not None:
                nn.utils.clip_grad_norm_(ddp.parameters(), plan.max_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            if step == plan.max_steps:
                break
        epoch += 1
    dist.barrier()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double().tolist()


def _schedule(optimizer: torch.optim.Optimizer, plan: Plan) -> torch.optim.lr_scheduler.LinearLR:
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1 if plan.scheduled else 1.0, total_iters=plan.max_steps)


def disturb(model: Blocks, plan: Plan, rank: int, guard: Guard) -> None:
    mine = [s for s in plan.strikes if s.rank == rank and s.phase in ("forward", "backward")]
    left = {strike: strike.times for strike in mine}

    def fault(layer: int, x: torch.Tensor) -> torch.Tensor:
        for strike in mine:
            due = guard.steps_completed + 1 >= strike.step and layer == strike.layer and len(x) > strike.rows
            if not due or not torch.is_grad_enabled() or left[strike] == 0:
                continue
            left[strike] = None if left[strike] is None else left[strike] - 1  # type: ignore[operator]
            if strike.phase == "forward":
                raise out_of_memory_error()
            return _FailInBackward.apply(x)  # type: ignore[no-any-return,no-untyped-call]
        return x

    model.fault = fault
