"""The gradients of DDP models averaged over ranks by the guard itself, so that one rank may retry its backward pass.

DDP's own reducer cannot be retried: after a failed backward pass its next forward raises, and a repeated one marks
variables twice. So DDP is kept in ``no_sync`` for good, and the guard sums buckets of gradients with asynchronous
all-reduces, in one fixed order, each as soon as its last gradient is there: communication overlaps with the rest of the
backward pass, as DDP's does. A gradient is complete after one accumulation a backward pass, so a pass that ran out of
memory leaves complete gradients and missing ones; only the missing ones are computed again, and the buckets already
sent stay right. The other ranks wait in their all-reduce meanwhile: nothing is computed twice there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainwarden.errors import InvalidSettingError
from trainwarden.runtime.ranks import reachable

BUCKET_BYTES = 25 * 2**20
"""DDP's ``bucket_cap_mb``."""


@dataclass
class _Bucket:
    """Parameters of one type and device, in the order in which their gradients become ready."""

    parameters: list[nn.Parameter]
    missing: int = 0
    """How many gradients are not complete yet."""
    flat: Tensor | None = None
    """The gradients one after the other, divided by the number of ranks; then one element a parameter: the share of
    ranks that have a gradient for it."""
    work: Any = None


class GradientExchange:
    """Averages the gradients of ``models`` over their process group, once per synchronised ``backward``.

    All methods between `begin` and `finish` are called in the same order on every rank, as often as it takes.

    Raises `InvalidSettingError` for models in different process groups.
    """

    def __init__(self, models: Sequence[DistributedDataParallel], bucket_bytes: int = BUCKET_BYTES) -> None:
        groups = {id(model.process_group): model.process_group for model in models}
        if len(groups) != 1:
            expected = "DDP models that share one process group"
            raise InvalidSettingError(setting="watch(model=)", value=f"{len(groups)} groups", expected=expected)
        self._models = models
        (self._group,) = groups.values()
        self._world_size = dist.get_world_size(self._group)
        self._buckets = list(_buckets(models, bucket_bytes))
        self._bucket_of = {id(p): bucket for bucket in self._buckets for p in bucket.parameters}
        self._complete: set[int] = set()
        self._armed = False
        self._sent = 0
        self._hooks: list[Any] = []

    def install(self) -> None:
        """Hooks every parameter that takes part."""
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                hook = parameter.register_post_accumulate_grad_hook(self._on_gradient)  # type: ignore[no-untyped-call]
                self._hooks.append(hook)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @property
    def wanted(self) -> bool:
        """Whether this backward synchronises: the user is not inside ``no_sync`` (part of an accumulation window)."""
        return any(model.require_backward_grad_sync for model in self._models)

    def held(self) -> AbstractContextManager[None]:
        """DDP's own communication, of gradients and buffers, is off inside."""
        return silenced(self._models)

    # -- one exchange --------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Before the first forward pass: buffers (BatchNorm statistics) become those of rank 0, as under DDP."""
        self._complete.clear()
        self._sent = 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)
            bucket.flat = bucket.work = None
        with reachable("broadcast of buffers"):
            for model in self._models:
                if model.broadcast_buffers:
                    for buffer in model.module.buffers():
                        dist.broadcast(buffer, group_src=0, group=self._group)

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Around the last forward and backward pass of the exchange: gradients are complete in it, and are sent."""
        self._armed = True
        try:
            yield
        finally:
            self._armed = False

    @property
    def begun_sending(self) -> bool:
        """Whether a gradient of this exchange is on its way: the window cannot start again from clean gradients."""
        return self._sent > 0

    def forget(self) -> None:
        """The gradients are dropped and computed again. Only before anything was sent."""
        self._complete.clear()
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)

    def is_complete(self, leaf: Tensor) -> bool:
        """Whether the last pass reached this leaf before it failed."""
        return id(leaf) in self._complete

    def finish(self, loss: Tensor | None) -> Tensor:
        """After the last backward pass, or instead of it: sends the rest, waits, and puts the means into ``.grad``.

        A parameter without a gradient on any rank keeps none. Returns the sum of the ranks' losses (a 0-d tensor, not
        read here): not finite if one of them is not, so that all ranks judge the step alike.
        """
        while self._sent < len(self._buckets):
            self._send(self._buckets[self._sent])
        device = self._buckets[0].parameters[0].device if self._buckets else torch.device("cpu")
        losses = torch.zeros((), device=device) if loss is None else loss.detach().to(device, torch.float32, copy=True)
        with reachable("gradient exchange"):
            summed = dist.all_reduce(losses, group=self._group, async_op=True)
        for bucket in self._buckets:
            with reachable("gradient exchange"):
                bucket.work.wait()
            self._receive(bucket)
            bucket.flat = bucket.work = None
        with reachable("gradient exchange"):
            summed.wait()
        return losses

    def _on_gradient(self, parameter: Tensor) -> None:
        if not self._armed or id(parameter) in self._complete:
            return
        self._complete.add(id(parameter))
        self._bucket_of[id(parameter)].missing -= 1
        while self._sent < len(self._buckets) and not self._buckets[self._sent].missing:
            self._send(self._buckets[self._sent])

    def _send(self, bucket: _Bucket) -> None:
        bucket.flat = _flattened(bucket.parameters, 1.0 / self._world_size)
        with reachable("gradient exchange"):
            bucket.work = dist.all_reduce(bucket.flat, group=self._group, async_op=True)
        self._sent += 1

    def _receive(self, bucket: _Bucket) -> None:
        assert bucket.flat is not None
        count = len(bucket.parameters)
        values, holders = bucket.flat[:-count], bucket.flat[-count:]
        views = torch.split(values, [p.numel() for p in bucket.parameters])
        means = [view.view_as(p) for view, p in zip(views, bucket.parameters, strict=True)]
        here = [(p.grad, mean) for p, mean in zip(bucket.parameters, means, strict=True) if p.grad is not None]
        if here:
            torch._foreach_copy_([gradient for gradient, _ in here], [mean for _, mean in here])
        if len(here) == count:
            return
        for index, (parameter, mean) in enumerate(zip(bucket.parameters, means, strict=True)):
            if parameter.grad is None and float(holders[index]):
                parameter.grad = mean.clone()


@contextmanager
def silenced(models: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """DDP's own communication, of gradients and buffers, is off inside: its reducer does not see the passes."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(model.no_sync())
            stack.callback(setattr, model, "require_forward_param_sync", model.require_forward_param_sync)
            model.require_forward_param_sync = False
        yield


def lone_replicas(models: Sequence[nn.Module]) -> list[DistributedDataParallel]:
    """Those of ``models`` that are DDP with one process in the group: nothing to exchange, and a reducer in the way."""
    found = [model for model in models if isinstance(model, DistributedDataParallel)]
    return [model for model in found if dist.get_world_size(model.process_group) == 1]


def exchange_of(models: Sequence[nn.Module], say: Callable[[str], None]) -> GradientExchange | None:
    """The exchange for those of ``models`` that are DDP; ``None`` without any, or with one process in the group."""
    found = [model for model in models if isinstance(model, DistributedDataParallel)]
    if not found or dist.get_world_size(found[0].process_group) < 2:
        return None
    if any(getattr(model, "_comm_hooks", None) for model in found):
        say("DDP's communication hook is not used: the guard exchanges the gradients itself, to be able to retry")
    return GradientExchange(found)


def _buckets(models: Sequence[nn.Module], bucket_bytes: int) -> Iterator[_Bucket]:
    """In the reverse order of construction, which is about the order of a backward pass; each parameter once."""
    seen: dict[int, nn.Parameter] = {id(p): p for model in models for p in model.parameters() if p.requires_grad}
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in reversed(list(seen.values())):
        kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for parameters in kinds.values():
        bucket = _Bucket([])
        size = 0
        for parameter in parameters:
            if bucket.parameters and size + parameter.nbytes > bucket_bytes:
                yield bucket
                bucket, size = _Bucket([]), 0
            bucket.parameters.append(parameter)
            size += parameter.nbytes
        yield bucket


def _flattened(parameters: Sequence[nn.Parameter], share: float) -> Tensor:
    """What a bucket sends: scaled before the sum, as DDP does, so that a sum in half precision does not overflow."""
    gradients = [p.grad for p in parameters]
    if any(gradient is not None and gradient.is_sparse for gradient in gradients):
        expected = "dense gradients: sparse ones cannot be averaged over ranks by the guard"
        raise InvalidSettingError(setting="watch(model=)", value="a sparse gradient", expected=expected)
    flat = parameters[0].new_empty(sum(p.numel() for p in parameters) + len(parameters))
    places = torch.split(flat, [*(p.numel() for p in parameters), len(parameters)])
    holders = [0.0 if gradient is None else share for gradient in gradients]
    places[-1].copy_(torch.tensor(holders))
    for parameter, gradient, place in zip(parameters, gradients, places, strict=False):
        if gradient is None:
            place.zero_()
        else:
            torch.mul(gradient, share, out=place.view_as(parameter))
    return flat
