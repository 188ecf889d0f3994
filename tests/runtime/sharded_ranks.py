"""What ranks are asked to do by the tests of `runtime.sharded`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from trainwarden.errors import CheckpointError
from trainwarden.runtime.gate import OptimizerGate
from trainwarden.runtime.sharded import (
    fill,
    is_sharded,
    local,
    summed,
    whole,
)
from trainwarden.runtime.watched import Watched


def odd_model() -> nn.Sequential:
    """Rows that do not divide by two, one row alone, and buffers."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1), nn.BatchNorm1d(1))


def stepped(model: nn.Module, steps: int = 2) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        model(torch.randn(4, 3, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def layouts(rank: int) -> dict[str, Any]:
    """Tensors laid out over the ranks in every way that occurs, taken together and put back."""
    world_size = dist.get_world_size()
    line = init_device_mesh("cpu", (world_size,))
    square = init_device_mesh("cpu", (world_size, 1))
    found = {}
    for name, shape, mesh, placements in (
        ("rows", (5, 3), line, [Shard(0)]),
        ("fewer rows than ranks", (1, 3), line, [Shard(0)]),
        ("columns", (3, 5), line, [Shard(1)]),
        ("copies", (3, 5), line, [Replicate()]),
        ("two dimensions", (5, 3), square, [Shard(0), Replicate()]),
    ):
        tensor = torch.arange(shape[0] * shape[1], dtype=torch.float32).reshape(shape)
        piece = distribute_tensor(tensor, mesh, placements)
        everything = whole(piece)
        again = torch.zeros_like(piece)
        fill(again, tensor)
        found[name] = (
            (everything is None) == (rank != 0),
            everything is None or torch.equal(everything, tensor),
            torch.equal(local(again), local(piece)),
        )
    return found


def state_travels(rank: int) -> dict[str, Any]:
    """The state of a sharded model and its optimizer goes into a plain one and back into a sharded one."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = odd_model()
    for module in (sharded[0], sharded):
        fully_shard(module, mesh=mesh)
    optimizer = stepped(sharded)
    watched = Watched.collect(sharded, optimizer, None, None, {}, save_frozen=True)
    mine = [watched.state()]
    moments_here = [state["exp_avg"] for state in mine[0]["optimizer"]["state"].values()]
    pieces = [value for value in _leaves(mine[0]) if is_sharded(value)]
    dist.broadcast_object_list(mine, src=0)  # as a checkpoint that every rank reads
    state = mine[0]

    plain = odd_model()
    plain_optimizer = stepped(plain, steps=1)
    Watched.collect(plain, plain_optimizer, None, None, {}, save_frozen=True).load_state(state, "here")

    other = odd_model()
    fully_shard(other, mesh=mesh)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.1)
    Watched.collect(other, other_optimizer, None, None, {}, save_frozen=True).load_state(state, "here")
    moments = [local(value) for value in _leaves(other_optimizer.state_dict()["state"])]
    expected = [local(value) for value in _leaves(optimizer.state_dict()["state"])]
    return {
        "pieces": len(pieces),
        "none_elsewhere": all((leaf is None) == (rank != 0) for leaf in moments_here),
        "plain": _digest(plain.state_dict()) == _digest(state["model"]),
        "plain_moments": _digest(plain_optimizer.state_dict()["state"]) == _digest(state["optimizer"]["state"]),
        "again": all(torch.equal(a, b) for a, b in zip(moments, expected, strict=True)),
        "weights": all(
            torch.equal(local(a), local(b)) for a, b in zip(other.parameters(), sharded.parameters(), strict=True)
        ),
    }


def refuses_another_shape(rank: int) -> str:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = nn.Linear(3, 4)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = Watched.collect(model, optimizer, None, None, {}, save_frozen=True)
    state = {"model": nn.Linear(3, 5).state_dict(), "optimizer": optimizer.state_dict()}
    try:
        watched.load_state(state, "here")
    except CheckpointError as error:
        return str(error)
    return ""


def verdicts(rank: int, bad_rank: int, mode: Any, what: str) -> tuple[bool, bool, bool]:
    """(loss finite, gradients finite, weights unchanged) of a step whose loss or gradient is bad on one rank only."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    loss = model(torch.ones(2, 3)).square().mean()
    loss.backward()
    losses = [loss.detach()]
    if rank == bad_rank:
        if what == "loss":
            losses = [loss.detach() * float("inf")]
        else:
            local(model.weight.grad)[0, 0] = float("nan")
    gate = OptimizerGate(
        optimizer, take_losses=lambda: losses, on_called=lambda: None, current_step=lambda: 0, mode=mode
    )
    gate.install()
    before = local(model.weight).clone()
    optimizer.step()
    ((_, findings),) = gate.poll(wait=True)
    return findings.loss_finite, findings.gradients_finite, torch.equal(before, local(model.weight))


def sums(rank: int) -> float:
    return float(summed(torch.tensor(float(rank + 1)), dist.group.WORLD))


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in _leaves(value)]
    if isinstance(tree, (list, tuple)):
        return [leaf for value in tree for leaf in _leaves(value)]
    return [tree] if isinstance(tree, torch.Tensor) or tree is None else []


def _digest(tree: Any) -> list[Any]:
    return [leaf.tolist() for leaf in _leaves(tree)]
