"""The processes that train one model: how they meet, what they do together, and a whole copy of the model on each.

Under a launcher (torchrun, ``accelerate launch``) every rank makes its own `Trainer`. `DataParallel` is then an
accelerate ``Accelerator`` whose DDP never speaks: the guard of the run exchanges the gradients. Alone it is that
accelerator and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainwarden.capability.distributed import launched_ranks
from trainwarden.errors import InvalidSettingError, RankLostError, WardenError
from trainwarden.runtime.ranks import (
    DEFAULT_DEADLINE_S,
    Ranks,
    current_ranks,
    is_rank_failure,
    leave_together,
    reachable,
)
from trainwarden.runtime.sharded import summed
from trainwarden.train.precision import Precision

T = TypeVar("T")


class Processes:
    """What the ranks of a training do together, whatever part of the model each of them holds."""

    ranks: Ranks

    @property
    def rank(self) -> int:
        return self.ranks.rank

    @property
    def world_size(self) -> int:
        return self.ranks.world_size

    def together(self, do: Callable[[], T]) -> T:
        """What ``do`` returns on this rank, once it has succeeded on all; else its error on all. Collective."""
        found: list[T] = []
        error: WardenError | None = None
        try:
            found.append(do())
        except WardenError as problem:
            error = problem
        error = leave_together(self.ranks, error)
        if error is not None:
            raise error
        return found[0]

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a 0-d tensor over the ranks, the same on each. Collective."""
        return summed(value, dist.group.WORLD if self.world_size > 1 else None)


@dataclass(eq=False)
class DataParallel(Processes):
    """Ranks that each hold the whole model, or one process alone, and the accelerate ``Accelerator`` of each."""

    accelerator: Any
    ranks: Ranks
    seed: int

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @property
    def scaler(self) -> Any:
        """The ``GradScaler`` of float16; None otherwise."""
        return self.accelerator.scaler

    @property
    def loads_weights(self) -> bool:
        """Whether this rank reads the model's weights itself."""
        return True

    def prepare(self, what: Any) -> Any:
        """As accelerate does; a model of several ranks is wrapped in DDP and has rank 0's weights. Collective then."""
        with reachable("spreading the weights", is_failure=is_rank_failure):
            prepared = self.accelerator.prepare(what)
        if self.world_size == 1 and isinstance(prepared, DistributedDataParallel):
            return prepared.module  # a launcher has started one process: its reducer would forbid a second attempt
        if self.rank and isinstance(prepared, nn.Module):
            torch.manual_seed(self.seed + self.rank)  # or dropout would drop the same on all ranks
        return prepared

    def unwrap_model(self, model: nn.Module, **options: Any) -> nn.Module:
        unwrapped: nn.Module = self.accelerator.unwrap_model(model, **options)
        return unwrapped


@contextmanager
def data_parallel(
    device: torch.device, precision: Precision, seed: int, *, deadline_s: float = DEFAULT_DEADLINE_S
) -> Iterator[DataParallel]:
    """This process, or this rank of those that a launcher has started, seeded alike; all is left as it was found.

    ``deadline_s``: how long a rank is waited for. Once they have the model, ranks other than 0 draw random numbers of
    their own.

    Raises:
        InvalidSettingError: half of a launcher's variables, a strategy of accelerate's other than data parallelism, or
            an ``Accelerator`` of another precision or device in this process.
        RankLostError: the other ranks did not come in time.
    """
    _check_launcher()
    launched = launched_ranks(os.environ) is not None
    with process_group(device, deadline_s) if launched else nullcontext():
        ranks = current_ranks(deadline_s)
        try:
            with _accelerator(device, precision, seed) as accelerator:
                _check_strategy(accelerator, ranks.world_size)
                yield DataParallel(accelerator, ranks, seed)
        finally:
            ranks.close()


def device_of_rank(device: torch.device) -> torch.device:
    """The GPU that the launcher means for this rank, made the current one; other devices as they are."""
    local = os.environ.get("LOCAL_RANK", "")
    if device.type != "cuda" or not local.isdecimal():
        return device
    device = torch.device("cuda", int(local))
    torch.cuda.set_device(device)
    return device


@contextmanager
def process_group(device: torch.device, deadline_s: float) -> Iterator[None]:
    """The process group of the launched ranks, ended again; one that is there already is used and left alone.

    Raises `RankLostError` when the others do not come within ``deadline_s``.
    """
    if dist.is_initialized():
        yield
        return
    launched = launched_ranks(os.environ)
    assert launched is not None
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, init_method="env://", timeout=timedelta(seconds=deadline_s))
        # Nobody goes on before all are there: a rank that is refused at once would close connections still to be made,
        # and the others would tell of a lost rank instead of the refusal.
        dist.all_reduce(torch.zeros(1))
    except RuntimeError as error:
        problem = f"meet: {str(error).strip().splitlines()[0]}"
        raise RankLostError(rank=launched[0], world_size=launched[1], problem=problem) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _accelerator(device: torch.device, precision: Precision, seed: int) -> Iterator[Any]:
    """An `Accelerator`, and everything seeded; accelerate's process-wide state is left as it was found."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, is_initialized
    from accelerate.utils import set_seed

    was_initialized = is_initialized()
    set_seed(seed)
    try:
        accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision.accelerate_name)
    except ValueError as error:  # one precision and device a process, and somebody was here before
        name = precision.accelerate_name
        expected = "the precision and device of the Accelerator that this process has made already"
        raise InvalidSettingError(setting="dtype, device", value=f"{name}, {device}", expected=expected) from error
    try:
        yield accelerator
    finally:
        for model in accelerator._models:
            bare = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            for one in (model, bare):
                vars(one).pop("_is_accelerate_prepared", None)  # or a later training would not prepare it
        if not was_initialized:
            # Its state is one a process and refuses a second Accelerator with another precision or device.
            AcceleratorState._reset_state(reset_partial_state=True)


def _check_launcher() -> None:
    """Refuses what says that there are several ranks without saying how they meet."""
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size != "1" and launched_ranks(os.environ) is None:
        expected = "1, or what torchrun and accelerate launch set with it: RANK, MASTER_ADDR and MASTER_PORT"
        raise InvalidSettingError(setting="WORLD_SIZE", value=world_size, expected=expected)
    for name in _OTHER_STRATEGIES:
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "y", "on"):
            raise InvalidSettingError(setting=name, value=os.environ[name], expected=_DATA_PARALLEL)


_OTHER_STRATEGIES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")
"""What ``accelerate launch`` sets for them; accelerate acts upon it wherever an ``Accelerator`` is made."""
_DATA_PARALLEL = "false: a Trainer trains data-parallel (DDP), and with full_ft_offload=True shards by itself (FSDP2)"


def _check_strategy(accelerator: Any, world_size: int) -> None:
    strategy = str(accelerator.distributed_type.value)
    if strategy not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise InvalidSettingError(setting="accelerate's distributed_type", value=strategy, expected="MULTI_GPU")
    if accelerator.num_processes != world_size:
        expected = f"{world_size}, the size of this process's group: start the ranks with torchrun or accelerate launch"
        raise InvalidSettingError(setting="WORLD_SIZE", value=accelerator.num_processes, expected=expected)
