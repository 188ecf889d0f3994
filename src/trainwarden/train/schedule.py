"""The optimizer and the learning rate over the steps."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from trainwarden.train.quantized import adamw_8bit
from trainwarden.train.settings import OptimizerChoice, Schedule

_FUSED_DEVICES = frozenset({"cpu", "cuda"})


def lr_factor(step: int, *, schedule: Schedule, warmup_steps: int, max_steps: int) -> float:
    """The share of the peak learning rate that step ``step`` (from 0) is taken with.

    It rises linearly over ``warmup_steps`` and then stays, or falls linearly or along a half cosine so that
    it would reach 0 one step after the last.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / (max_steps - warmup_steps))
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def build_schedule(
    optimizer: torch.optim.Optimizer, *, schedule: Schedule, warmup_steps: int, max_steps: int
) -> LambdaLR:
    """A scheduler whose whole state is its step count; the function is rebuilt, not saved."""
    return LambdaLR(optimizer, partial(lr_factor, schedule=schedule, warmup_steps=warmup_steps, max_steps=max_steps))


def build_adamw(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    device: torch.device,
    kind: OptimizerChoice = "adamw",
) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, decaying matrices only, fused where torch can; or that of bitsandbytes.

    A fused step lets the guard keep a non-finite gradient from the weights without reading anything from the
    device.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if kind == "adamw_8bit":
        return adamw_8bit(groups, learning_rate=learning_rate)
    return torch.optim.AdamW(groups, lr=learning_rate, fused=device.type in _FUSED_DEVICES)
