"""Small real training loops that the runtime's tests disturb and compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from trainwarden import Guard
from trainwarden.events import Event

torch.set_num_threads(1)

ComputeLoss = Callable[[Any], torch.Tensor]


class Rows(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """A map-style regression data set that remembers which samples were loaded."""

    def __init__(self, count: int = 80, width: int = 6, noise: bool = False) -> None:
        generator = torch.Generator().manual_seed(7)
        self.inputs = torch.randn(count, width, generator=generator)
        self.targets = torch.randn(count, 1, generator=generator)
        self.noise = noise
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.loaded.append(index)
        sample = self.inputs[index]
        return sample + torch.randn(()) if self.noise else sample, self.targets[index]


def small_model(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 1))


@dataclass
class Loop:
    """A loop as a user would write it; ``disturb`` wraps the loss with a fault."""

    run_dir: Path
    max_steps: int = 10
    batch_size: int = 8
    dropout: float = 0.0
    fused: bool = False
    make_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None
    disturb: Callable[[ComputeLoss, Guard], ComputeLoss] | None = None
    guard_options: dict[str, Any] = field(default_factory=dict)
    loader: Any = None
    after_step: Callable[[Guard], None] | None = None

    def __post_init__(self) -> None:
        self.events: list[Event] = []
        self.losses: list[float] = []
        self.learning_rates: list[float] = []
        self.model = small_model(self.dropout)
        make = self.make_optimizer or (lambda p: torch.optim.AdamW(p, lr=1e-2, fused=self.fused))
        self.optimizer = make(self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.1, total_iters=10)
        self.guard = Guard(self.run_dir, observers=[self.events.append], **self.guard_options)

    def compute_loss(self, batch: Sequence[torch.Tensor]) -> torch.Tensor:
        inputs, targets = batch
        return functional.mse_loss(self.model(inputs), targets)

    def run(self) -> Loop:
        torch.manual_seed(11)
        if self.loader is None:
            self.loader = DataLoader(Rows(), batch_size=self.batch_size, shuffle=True)
        loss_of = self.disturb(self.compute_loss, self.guard) if self.disturb else self.compute_loss
        with self.guard.watch(model=self.model, optimizer=self.optimizer, scheduler=self.scheduler):
            for batch in self.guard.batches(self.loader, max_steps=self.max_steps):
                self.losses.append(float(self.guard.backward(loss_of, batch)))
                self.optimizer.step()
                self.learning_rates.append(self.scheduler.get_last_lr()[0])
                self.scheduler.step()
                self.optimizer.zero_grad()
                if self.after_step:
                    self.after_step(self.guard)
        return self

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])

    def named(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative distance of two flat parameter vectors, in float64."""
    return float((a.double() - b.double()).norm() / b.double().norm())
