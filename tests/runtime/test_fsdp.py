"""A raw loop over a model that FSDP2 has sharded in one process recovers as it does over a plain one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from trainwarden import Guard
from trainwarden.errors import RestartNeededError
from trainwarden.runtime.fsdp import ShardedPasses
from trainwarden.runtime.sharded import local
from trainwarden.testing import out_of_memory_error

DATA = [torch.randn(8, 6, generator=torch.Generator().manual_seed(i)) for i in range(4)]


@pytest.fixture(autouse=True)
def _one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model_in_pieces() -> Any:
    torch.manual_seed(2)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 6)) for _ in range(3)])
    mesh = init_device_mesh("cpu", (1,))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


class Strikes:
    """Ends the backward pass inside the second block, the first ``times`` times that it has more than 2 rows."""

    def __init__(self, times: int) -> None:
        self.left = times

    def __call__(self, _module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad and len(output) > 2 and self.left:
            output.register_hook(self._strike)

    def _strike(self, _gradient: torch.Tensor) -> None:
        self.left -= 1
        raise out_of_memory_error()


def train(run_dir: Path, strikes: int, *, wrap: Callable[[nn.Module], nn.Module] = lambda model: model) -> torch.Tensor:
    """Two micro-batches a step; memory runs out in the second one of the second step."""
    model = model_in_pieces()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    guard = Guard(run_dir, observers=[])
    strike = Strikes(strikes)
    outer = wrap(model)
    with guard.watch(model=outer, optimizer=optimizer):
        for index, batch in enumerate(guard.batches(DATA, max_steps=4)):
            if index == 3:
                model[1][0].register_forward_hook(strike)
            guard.backward(lambda rows: outer(rows).square().mean(), batch)
            if index % 2:
                optimizer.step()
                optimizer.zero_grad()
    assert strike.left == 0
    return torch.cat([local(parameter).reshape(-1) for parameter in model.parameters()]).double()


@pytest.mark.parametrize("strikes", [1, 2])
def test_a_pass_that_ended_inside_a_block_is_done_again_in_parts(tmp_path: Path, strikes: int) -> None:
    whole = train(tmp_path / "whole", 0)
    split = train(tmp_path / "split", strikes)
    assert float((split - whole).norm() / whole.norm()) < 1e-6


def test_a_pass_that_ends_in_an_error_leaves_the_gradients_of_the_passes_before_it() -> None:
    model = model_in_pieces()
    parameter = next(iter(model.parameters()))
    before = parameter.grad = torch.ones_like(parameter)
    with pytest.raises(KeyError), ShardedPasses([model]).gradients_set_aside(model.parameters()):
        assert parameter.grad is None
        parameter.grad = torch.full_like(parameter, torch.nan)
        raise KeyError
    assert parameter.grad is before
    assert torch.equal(local(before), torch.ones_like(local(before)))


def test_sharded_modules_are_found_inside_others(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", 0)
    split = train(tmp_path / "split", 1, wrap=nn.Sequential)
    assert float((split - whole).norm() / whole.norm()) < 1e-6


def test_a_torch_that_cannot_bring_fsdp_to_rest_leaves_it_to_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(FSDPModule, "reset_iter_state")
    with pytest.raises(RestartNeededError):
        train(tmp_path, 1)


def test_models_that_are_not_sharded_cost_nothing() -> None:
    model = nn.Linear(2, 2)
    model.weight.grad = torch.ones(2, 2)
    passes = ShardedPasses([model])

    def compute_loss(_batch: Any) -> torch.Tensor:
        return model.weight.sum()

    assert passes.can_repeat
    assert passes.from_rest(compute_loss) is compute_loss
    with passes.gradients_set_aside(model.parameters()):
        assert model.weight.grad is not None


def test_a_model_that_has_never_run_can_be_brought_to_rest() -> None:
    ShardedPasses([model_in_pieces()]).settle()
