"""The states that training really has: a run continued from its stored state goes on bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import optim
from torch.optim import lr_scheduler

from .states import round_trip, same

OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "SGD": lambda parameters: optim.SGD(parameters, 0.1, momentum=0.9, nesterov=True),
    "Adam": lambda parameters: optim.Adam(parameters, amsgrad=True),
    "AdamW fused": lambda parameters: optim.AdamW(parameters, fused=True),
    "AdamW foreach": lambda parameters: optim.AdamW(parameters, foreach=True),
    "Adagrad": optim.Adagrad,
    "Adadelta": optim.Adadelta,
    "Adafactor": optim.Adafactor,
    "Adamax": optim.Adamax,
    "ASGD": optim.ASGD,
    "NAdam": optim.NAdam,
    "RAdam": optim.RAdam,
    "RMSprop": lambda parameters: optim.RMSprop(parameters, momentum=0.9, centered=True),
    "Rprop": optim.Rprop,
    "LBFGS": lambda parameters: optim.LBFGS(parameters, 0.1, max_iter=3),
    "two groups": lambda parameters: _two_groups(list(parameters)),
}


def _two_groups(parameters: list[Any]) -> optim.Optimizer:
    groups = [{"params": parameters[:1], "lr": 0.5}, {"params": parameters[1:], "name": "rest"}]
    return optim.AdamW(groups, betas=(0.8, 0.9))


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))


def train(net: torch.nn.Module, optimizer: optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        batch = torch.randn(8, 3, generator=generator)

        def loss(batch: torch.Tensor = batch) -> torch.Tensor:
            optimizer.zero_grad()
            value = net(batch).square().mean()
            value.backward()
            return value

        optimizer.step(loss)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_bit_for_bit(name: str) -> None:
    net = model()
    optimizer = OPTIMIZERS[name](net.parameters())
    train(net, optimizer, range(3))
    state = round_trip({"model": net.state_dict(), "optimizer": optimizer.state_dict()})
    assert same(state["optimizer"], optimizer.state_dict())

    other = model()
    again = OPTIMIZERS[name](other.parameters())
    other.load_state_dict(state["model"])
    again.load_state_dict(state["optimizer"])
    train(net, optimizer, range(3, 6))
    train(other, again, range(3, 6))
    assert same(other.state_dict(), net.state_dict())
    assert same(again.state_dict(), optimizer.state_dict())


class Warmup:
    """A schedule with a state of its own, which LambdaLR stores as a dict."""

    def __init__(self) -> None:
        self.steps = 3

    def __call__(self, step: int) -> float:
        return min(1.0, (step + 1) / self.steps)


SCHEDULERS: dict[str, Callable[[optim.Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3, 3]),
    "ConstantLR": lr_scheduler.ConstantLR,
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lr_scheduler.PolynomialLR,
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, Warmup()),
    "LambdaLR of a function": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9 + step * 0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


def rates(optimizer: optim.Optimizer, scheduler: Any, steps: int) -> list[float]:
    seen = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        seen.append(optimizer.param_groups[0]["lr"])
    return seen


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:.*epoch parameter.*:UserWarning")  # SequentialLR's own use
def test_a_schedule_goes_on_where_it_was(name: str) -> None:
    def fresh() -> tuple[optim.Optimizer, Any]:
        optimizer = optim.SGD(torch.nn.Linear(1, 1).parameters(), 0.05, momentum=0.9)
        return optimizer, SCHEDULERS[name](optimizer)

    optimizer, scheduler = fresh()
    rates(optimizer, scheduler, 3)
    state = round_trip({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()})
    assert same(state["scheduler"], scheduler.state_dict())

    other, again = fresh()
    other.load_state_dict(state["optimizer"])
    again.load_state_dict(state["scheduler"])
    assert rates(other, again, 4) == rates(optimizer, scheduler, 4)


def test_a_plateau_schedule_goes_on_where_it_was() -> None:
    optimizer = optim.SGD(torch.nn.Linear(1, 1).parameters(), 0.05)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
    scheduler.step(1.0)
    assert same(round_trip(scheduler.state_dict()), scheduler.state_dict())


def test_averaged_weights_and_gradient_scaler_are_storable() -> None:
    averaged = optim.swa_utils.AveragedModel(model())
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    state = {"averaged": averaged.state_dict(), "scaler": scaler.state_dict()}
    assert same(round_trip(state), state)


def test_a_channels_last_model_keeps_its_order_in_the_optimizer_too() -> None:
    net = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = optim.AdamW(net.parameters())
    net(torch.randn(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    state = round_trip(optimizer.state_dict())["state"][0]["exp_avg"]
    assert state.stride() == net.weight.stride()
