"""The learning rate over the steps, and which parameters decay."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trainwarden.train.schedule import build_adamw, build_schedule, lr_factor
from trainwarden.train.settings import Schedule

SCHEDULES: list[Schedule] = ["linear", "cosine", "constant"]
LENGTHS = st.integers(1, 200).flatmap(lambda steps: st.tuples(st.just(steps), st.integers(0, steps - 1)))


def factors(schedule: Schedule, warmup_steps: int, max_steps: int) -> list[float]:
    return [
        lr_factor(step, schedule=schedule, warmup_steps=warmup_steps, max_steps=max_steps) for step in range(max_steps)
    ]


@given(st.sampled_from(SCHEDULES), LENGTHS)
def test_the_rate_rises_then_never_rises_again_and_no_step_is_wasted(
    schedule: Schedule, lengths: tuple[int, int]
) -> None:
    max_steps, warmup_steps = lengths
    found = factors(schedule, warmup_steps, max_steps)
    assert all(0.0 < factor <= 1.0 for factor in found)
    assert found[: warmup_steps + 1] == sorted(found[: warmup_steps + 1])
    assert found[warmup_steps] == 1.0
    assert found[warmup_steps:] == sorted(found[warmup_steps:], reverse=True)


def test_the_shapes_are_those_of_their_names() -> None:
    assert factors("linear", 0, 4) == [1.0, 0.75, 0.5, 0.25]
    assert factors("cosine", 0, 4)[2] == pytest.approx(0.5)
    assert factors("constant", 0, 4) == [1.0] * 4
    assert factors("linear", 1, 3) == [0.5, 1.0, 0.5]


def test_a_resumed_schedule_goes_on_where_it_was() -> None:
    def built() -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
        return optimizer, build_schedule(optimizer, schedule="cosine", warmup_steps=2, max_steps=10)

    (unbroken_optimizer, unbroken), (optimizer, first) = built(), built()
    for _ in range(4):
        for each, scheduler in ((unbroken_optimizer, unbroken), (optimizer, first)):
            each.step()
            scheduler.step()
    resumed_optimizer, resumed = built()
    resumed.load_state_dict(first.state_dict())
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    for each, scheduler in ((unbroken_optimizer, unbroken), (resumed_optimizer, resumed)):
        each.step()
        scheduler.step()
    assert resumed.get_last_lr() == unbroken.get_last_lr()
    assert resumed_optimizer.param_groups[0]["lr"] == unbroken_optimizer.param_groups[0]["lr"]


def test_only_trainable_matrices_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    model[2].weight.requires_grad_(False)
    optimizer = build_adamw(model, learning_rate=0.1, weight_decay=0.3, device=torch.device("cpu"))
    decaying, others = optimizer.param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert [id(p) for p in decaying["params"]] == [id(model[0].weight)]
    assert len(others["params"]) == 4
    assert decaying["fused"] is True
