"""Full fine-tuning with weights, gradients and optimizer on the host: FSDP2 with CPU offload, in one process or many.

Every rank keeps its piece of each float32 weight, of its gradient and of the optimizer's states in host memory. A block
is gathered on the device, in the type of the computation, only while it is computed. Rank 0 loads the model; the others
build it without weights and are given their pieces.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainwarden.capability.distributed import launched_ranks
from trainwarden.errors import FSDPUnavailableError, InvalidSettingError
from trainwarden.runtime.ranks import DEFAULT_DEADLINE_S, Ranks, current_ranks
from trainwarden.runtime.sharded import spread
from trainwarden.train.precision import Precision
from trainwarden.train.processes import Processes, device_of_rank, process_group


@dataclass(eq=False)
class Offload(Processes):
    """The ranks of an offloaded training: what an accelerate ``Accelerator`` is to any other."""

    device: torch.device
    precision: Precision
    ranks: Ranks
    mesh: Any
    seed: int
    scaler: None = field(default=None, init=False)

    @property
    def loads_weights(self) -> bool:
        """Whether this rank reads the model's weights itself; the others are given their pieces of rank 0's."""
        return self.rank == 0

    def prepare(self, what: Any) -> Any:
        """A model is put in pieces on the ranks' hosts; an optimizer over it needs nothing. Collective for models."""
        return self.shard(what) if isinstance(what, nn.Module) else SimpleNamespace(optimizer=what)

    def unwrap_model(self, model: nn.Module, **_: Any) -> nn.Module:
        return model

    def shard(self, model: nn.Module) -> nn.Module:
        """The model itself, its parameters DTensors of float32 whose pieces lie on the hosts. Collective.

        All ranks train the weights of rank 0. Ranks other than 0 may bring parameters on the meta device.
        """
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        whole = dict(model.named_parameters()) if self.world_size > 1 and self.rank == 0 else {}
        weights: dict[str, Tensor] = {name: parameter.detach() for name, parameter in whole.items()}
        whole.clear()
        options: dict[str, Any] = {
            "mesh": self.mesh,
            "mp_policy": MixedPrecisionPolicy(param_dtype=self.precision.compute, reduce_dtype=torch.float32),
            "offload_policy": CPUOffloadPolicy(pin_memory=self.device.type == "cuda"),
        }
        for block in blocks(model):
            fully_shard(block, **options)
        fully_shard(model, **options)
        if self.world_size > 1:
            _allocate(model)
            spread(model, weights)
        if self.rank:
            torch.manual_seed(self.seed + self.rank)  # or dropout would drop the same on all ranks
        return model


@contextmanager
def offloading(
    device: torch.device, precision: Precision, seed: int, *, deadline_s: float = DEFAULT_DEADLINE_S
) -> Iterator[Offload]:
    """The ranks of this training, seeded; the process group is made and ended here unless there is one already.

    ``deadline_s``: how long a rank is waited for. Random numbers of rank 0 are those of a training in one process;
    once they have the model, other ranks draw their own.

    Raises:
        InvalidSettingError: float16, whose loss scaling knows of one process only.
        RankLostError: the other ranks did not come in time.
        FSDPUnavailableError: the process group that is there cannot carry tensors of the host.
    """
    from accelerate.utils import set_seed
    from torch.distributed.device_mesh import init_device_mesh

    if precision.compute is torch.float16:
        expected = "float32 or bfloat16 with full_ft_offload, which scales no loss"
        raise InvalidSettingError(setting="dtype", value="float16", expected=expected)
    device = device_of_rank(device)
    with _host_group(device, deadline_s):
        set_seed(seed)
        ranks = current_ranks(deadline_s)
        try:
            yield Offload(device, precision, ranks, init_device_mesh(device.type, (ranks.world_size,)), seed)
        finally:
            ranks.close()


@contextmanager
def _host_group(device: torch.device, deadline_s: float) -> Iterator[None]:
    """A process group that carries tensors of the host too; one of this process alone without a launcher."""
    if dist.is_initialized() and "cpu:" not in str(dist.get_backend_config()):
        problem = "the process group of this process has no backend for tensors on the host"
        raise FSDPUnavailableError(
            problem=problem, fix="make it with init_process_group('cpu:gloo,cuda:nccl')", **_UNMEASURED
        )
    if dist.is_initialized() or launched_ranks(os.environ) is not None:
        with process_group(device, deadline_s):
            yield
        return
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    store: Any = importlib.import_module("torch.distributed").HashStore()  # its stubs do not export it
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timedelta(seconds=deadline_s))
    try:
        yield
    finally:
        dist.destroy_process_group()


_UNMEASURED: dict[str, Any] = {"needed_bytes": None, "available_bytes": None}


def blocks(model: nn.Module) -> list[nn.Module]:
    """The parts of a model that are gathered one at a time, in their order; what is in none is gathered for all.

    The layers that transformers names as not to be split, else the entries of the largest ``ModuleList``; and
    embeddings and output layer where they do not share their weights.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        lists: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        found = list(max(lists, key=_numbers, default=nn.ModuleList()).children())
    inside = {id(module) for block in found for module in block.modules() if module is not block}
    outermost = [block for block in found if id(block) not in inside and _numbers(block)]
    return [*outermost, *_untied_ends(model)]


def _untied_ends(model: nn.Module) -> list[nn.Module]:
    ends = [get() for get in (getattr(model, f"get_{end}_embeddings", None) for end in ("input", "output")) if get]
    weights = [id(end.weight) for end in ends if isinstance(getattr(end, "weight", None), nn.Parameter)]
    return ends if len(set(weights)) == 2 else []


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _allocate(model: nn.Module) -> None:
    """Makes room on the host for pieces that are on the meta device; buffers stay as they are."""
    if not any(parameter.is_meta for parameter in model.parameters()):
        return
    buffers = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    model.to_empty(device="cpu")
    for module, name, buffer in buffers:
        module._buffers[name] = buffer
