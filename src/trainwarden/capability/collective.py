"""One rank of a trial run: an all-reduce, and a sharded step with CPU offload, at the true world size."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from trainwarden.capability.verdict import Verdict, supported, unknown, unsupported

PREFIX = "WARDEN_PROBE_"
"""Of the variables in which the parent says where this rank stands."""


@dataclass(frozen=True)
class Place:
    """Where a rank stands, and how the ranks find each other: by a file, or by a host and a port."""

    rank: int
    world_size: int
    local_rank: int
    backend: str
    """``nccl`` on GPUs; ``gloo`` on the CPU, for which this is a rehearsal."""
    meeting: str
    """``file:PATH`` or ``tcp:HOST:PORT``."""
    hosted: bool = False
    """Whether somebody else already serves the store at that port (torchrun's agent does)."""
    name: str = "0"
    """Keeps the keys of one trial apart from those of another and of the run itself."""
    enough_host_memory: bool = True
    deadline_s: float = 60.0

    def to_environ(self) -> dict[str, str]:
        """For the child's environment."""
        return {f"{PREFIX}{field.upper()}": str(value) for field, value in vars(self).items()}

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Place:
        """The inverse of `to_environ`."""
        said = {field: environ[f"{PREFIX}{field.upper()}"] for field in cls.__dataclass_fields__}
        return cls(
            rank=int(said["rank"]),
            world_size=int(said["world_size"]),
            local_rank=int(said["local_rank"]),
            backend=said["backend"],
            meeting=said["meeting"],
            hosted=said["hosted"] == "True",
            name=said["name"],
            enough_host_memory=said["enough_host_memory"] == "True",
            deadline_s=float(said["deadline_s"]),
        )


def all_reduce(place: Place) -> Verdict:
    """Join the others and add up one number a rank, and a second one: whether the host has enough memory.

    The sum of the second is the same on every rank, so that all of them come to the same conclusion.
    """
    import torch
    import torch.distributed as dist

    problem = _missing(place)
    if problem is not None:
        return problem
    device = _device(place)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if place.backend == "nccl" else place.backend,
        store=_store(place),
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=place.deadline_s),
    )
    numbers = torch.tensor([place.rank + 1, int(place.enough_host_memory)], device=device, dtype=torch.int64)
    dist.all_reduce(numbers)
    total, enough = (int(number) for number in numbers.cpu())
    short_of_memory = place.world_size - enough
    facts = {"world_size": place.world_size, "backend": place.backend, "ranks_short_of_host_memory": short_of_memory}
    if total != place.world_size * (place.world_size + 1) // 2:
        return unsupported(f"an all-reduce over {_ranks(place)} came out wrong", "see `NCCL_DEBUG=INFO`", **facts)
    return supported(f"an all-reduce over {_ranks(place)} is right", **facts)


def train_sharded(place: Place) -> Verdict:
    """One step of FSDP2 with parameters and optimizer on the host, in the group that `all_reduce` has joined."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    if not dist.is_initialized():
        return unsupported("the ranks could not join each other")
    device = _device(place)
    mesh = init_device_mesh(device.type, (place.world_size,))
    model = torch.nn.Linear(16, 16 * place.world_size)
    fully_shard(model, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=device.type == "cuda"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 16, device=device)).square().mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    on_host = all(parameter.device.type == "cpu" for parameter in model.parameters())
    finite = bool(torch.isfinite(norm))
    dist.destroy_process_group()
    if not (on_host and finite):
        return unsupported(f"a sharded step over {_ranks(place)} came out wrong", world_size=place.world_size)
    return supported(f"a sharded step with CPU offload over {_ranks(place)} is right", world_size=place.world_size)


def _missing(place: Place) -> Verdict | None:
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        return unsupported("this torch is built without torch.distributed", "install a torch build for Linux")
    if place.backend != "nccl":
        return None
    if not dist.is_nccl_available():
        return unsupported("this torch has no NCCL, which exists on Linux only", "use Linux or WSL2")
    if not torch.cuda.is_available():
        return unsupported("no CUDA device")
    if place.local_rank >= torch.cuda.device_count():
        return unknown(f"rank {place.rank} has no GPU of its own: {torch.cuda.device_count()} are visible here")
    return None


def _device(place: Place) -> Any:
    import torch

    if place.backend != "nccl":
        return torch.device("cpu")
    device = torch.device("cuda", place.local_rank)
    torch.cuda.set_device(device)
    return device


def _store(place: Place) -> Any:
    stores: Any = importlib.import_module("torch.distributed")  # its stubs do not export them
    kind, _, rest = place.meeting.partition(":")
    store: Any
    if kind == "file":
        store = stores.FileStore(rest, place.world_size)
    else:
        host, _, port = rest.rpartition(":")
        serves = place.rank == 0 and not place.hosted
        patience = timedelta(seconds=place.deadline_s)
        store = stores.TCPStore(host, int(port), place.world_size, serves, timeout=patience, wait_for_workers=False)
    return stores.PrefixStore(f"trainwarden-probe-{place.name}", store)


def _ranks(place: Place) -> str:
    return f"{place.world_size} rank{'' if place.world_size == 1 else 's'} ({place.backend})"
