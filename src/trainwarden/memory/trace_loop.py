"""The training loop whose memory is predicted: the same code runs it on fake tensors here and on real ones in tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from trainwarden.errors import InvalidSettingError
from trainwarden.memory.prediction import Phase

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
ComputeLoss = Callable[[nn.Module, Any], torch.Tensor]


def default_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """``model(**batch)`` for a mapping, ``model(*batch)`` for a tuple or list, else ``model(batch)``.

    Returns ``.loss`` of what comes back, or the mean of it (of its first element) in float32.
    """
    if isinstance(batch, Mapping):
        out = model(**batch)
    elif isinstance(batch, tuple | list):
        out = model(*batch)
    else:
        out = model(batch)
    loss = getattr(out, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss
    first = out if isinstance(out, torch.Tensor) else next(iter(out.values() if isinstance(out, Mapping) else out))
    return torch.mean(first.float())


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """torch's AdamW as it comes: on CUDA its foreach variant."""
    return torch.optim.AdamW(parameters)


@dataclass(frozen=True, kw_only=True)
class TrainingLoop:
    """What one training step does: micro-batches forward and backward, clipping, ``step`` and ``zero_grad``.

    Raises ValueError for settings that contradict each other.
    """

    compute_loss: ComputeLoss = default_loss
    """``compute_loss(model, batch)`` returns a scalar."""
    make_optimizer: MakeOptimizer = adamw
    """Takes the list of trainable parameters (one of them at a time with ``optimizer_in_backward``).
    `trainwarden.memory.trace_optimizers` has stand-ins for 8-bit and paged optimizers."""
    grad_accum_steps: int = 1
    autocast: torch.dtype | None = None
    max_grad_norm: float | None = None
    optimizer_in_backward: bool = False
    """Each parameter is updated as soon as its gradient is complete, and the gradient dropped."""

    def __post_init__(self) -> None:
        if self.grad_accum_steps < 1:
            raise InvalidSettingError(setting="grad_accum_steps", value=self.grad_accum_steps, expected="at least 1")
        if self.optimizer_in_backward and (self.grad_accum_steps > 1 or self.max_grad_norm is not None):
            expected = "false with accumulation or clipping: it leaves no gradient for them"
            raise InvalidSettingError(setting="optimizer_in_backward", value=True, expected=expected)


class Watcher(Protocol):
    """Is told where the loop is."""

    def enter(self, phase: Phase) -> None: ...

    def made(self, optimizers: list[torch.optim.Optimizer]) -> None: ...

    def warmed(self) -> None:
        """Only states have been made so far; what follows is the training."""
        ...


def run_steps(
    model: nn.Module,
    batch: Any,
    loop: TrainingLoop,
    *,
    steps: int = 2,
    watcher: Watcher | None = None,
    autocast: AbstractContextManager[Any] | None = None,
    states_first: bool = False,
) -> None:
    """Trains on ``batch`` for ``steps`` optimizer steps, as a plain PyTorch loop does.

    ``states_first`` makes the optimizer's states beforehand, by a step over gradients that no backward pass has made.
    """
    tell = _phase_of(watcher)
    optimizers, handles = _optimizers(model, loop)
    if watcher is not None:
        watcher.made(optimizers)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if states_first:
        tell("optimizer")
        _make_states(optimizers, parameters)
        if watcher is not None:
            watcher.warmed()
    try:
        for _ in range(steps):
            for _ in range(loop.grad_accum_steps):
                tell("forward")
                with autocast or nullcontext():
                    loss = loop.compute_loss(model, batch)
                tell("backward")
                (loss / loop.grad_accum_steps if loop.grad_accum_steps > 1 else loss).backward()  # type: ignore[no-untyped-call]
                del loss
            tell("optimizer")
            if loop.optimizer_in_backward:
                continue
            if loop.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameters, loop.max_grad_norm)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    finally:
        for handle in handles:
            handle.remove()


def _make_states(optimizers: list[torch.optim.Optimizer], parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _phase_of(watcher: Watcher | None) -> Callable[[Phase], None]:
    return watcher.enter if watcher is not None else lambda _: None


def _optimizers(model: nn.Module, loop: TrainingLoop) -> tuple[list[torch.optim.Optimizer], list[Any]]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not loop.optimizer_in_backward:
        return [loop.make_optimizer(parameters)] if parameters else [], []
    optimizers = {p: loop.make_optimizer([p]) for p in parameters}

    def update(parameter: torch.Tensor) -> None:
        optimizers[parameter].step()  # type: ignore[index]
        optimizers[parameter].zero_grad(set_to_none=True)  # type: ignore[index]

    handles = [p.register_post_accumulate_grad_hook(update) for p in parameters]  # type: ignore[no-untyped-call]
    return list(optimizers.values()), handles
