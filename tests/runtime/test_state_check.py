"""Trained parameters and the optimizer's state are looked at, and nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.runtime.loops import small_model
from trainwarden.runtime.state_check import first_bad_state, looks_finite


def trained(kind: type[torch.optim.Optimizer] = torch.optim.AdamW) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = small_model()
    optimizer = kind(model.parameters(), lr=0.01)  # type: ignore[call-arg]
    model(torch.ones(4, 6)).sum().backward()
    optimizer.step()
    return model, optimizer


def look(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[str, str] | None:
    return first_bad_state({"model": model}, {"optimizer": optimizer})


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.NAdam])
def test_healthy_states_are_healthy(kind: type[torch.optim.Optimizer]) -> None:
    assert look(*trained(kind)) is None


@pytest.mark.parametrize(("value", "kind"), [(math.nan, "nan"), (math.inf, "+inf"), (-math.inf, "-inf")])
def test_a_weight_is_named(value: float, kind: str) -> None:
    model, optimizer = trained()
    with torch.no_grad():
        model[3].weight[0, 7] = value
    assert look(model, optimizer) == ("model.3.weight", kind)


@pytest.mark.parametrize("state", ["exp_avg", "exp_avg_sq"])
def test_a_moment_is_named(state: str) -> None:
    model, optimizer = trained()
    optimizer.state[model[0].bias][state][2] = math.nan
    assert look(model, optimizer) == (f"optimizer {state} of model.0.bias", "nan")


def test_weights_in_half_precision_may_be_large() -> None:
    model = nn.Linear(200, 200).half()
    with torch.no_grad():
        model.weight.fill_(60_000.0)
    assert look(model, torch.optim.SGD(model.parameters(), lr=0.1)) is None


def test_a_parameter_of_no_model_is_named_by_its_place() -> None:
    stray = nn.Parameter(torch.tensor([math.nan]))
    assert look(nn.Identity(), torch.optim.SGD([stray], lr=0.1)) == ("optimizer.groups[0].params[0]", "nan")


def test_a_weight_whose_memory_was_given_back_is_left_out() -> None:
    """As FSDP leaves the gathered weights; an optimizer built while they were there still holds them."""
    model, optimizer = trained()
    model[0].weight.untyped_storage().resize_(0)
    assert look(model, optimizer) is None
    with torch.no_grad():
        model[3].weight[0, 7] = math.nan
    assert look(model, optimizer) == ("model.3.weight", "nan")


def test_counters_and_other_states_of_another_size_are_not_looked_at() -> None:
    model, optimizer = trained()
    optimizer.state[model[0].weight]["best"] = torch.tensor(math.inf)
    optimizer.state[model[0].weight]["names"] = ["x"]
    assert look(model, optimizer) is None


def test_the_alarm_covers_types_that_are_reduced_apart() -> None:
    tensors = [torch.ones(3), torch.ones(2, dtype=torch.float64), torch.ones(2).bfloat16(), torch.ones(0)]
    assert looks_finite(tensors)
    assert not looks_finite([*tensors, torch.tensor([math.inf]).half()])
    assert not looks_finite([torch.ones(2).to(torch.float8_e5m2)]), "8-bit floats are left to the exact pass"


def test_weights_in_8_bits_are_judged_exactly() -> None:
    weight = nn.Parameter(torch.ones(4).to(torch.float8_e5m2), requires_grad=False)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    assert look(nn.Identity(), optimizer) is None
    weight.data = torch.tensor([1.0, math.inf]).to(torch.float8_e5m2)
    assert look(nn.Identity(), optimizer) == ("optimizer.groups[0].params[0]", "+inf")
