"""Faults injected into a training step: memory that runs out, and values that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainwarden.runtime.split import rows as rows_of

ComputeLoss = Callable[[Any], torch.Tensor]


def out_of_memory_error(requested_bytes: int = 2 * 2**30, free_bytes: int = 2**20) -> torch.OutOfMemoryError:
    """The error that CUDA's caching allocator raises, with its text."""
    return torch.OutOfMemoryError(
        f"CUDA out of memory. Tried to allocate {requested_bytes / 2**30:.2f} GiB. GPU 0 has a total capacity of "
        f"79.11 GiB of which {free_bytes / 2**20:.2f} MiB is free. Including non-PyTorch memory, this process has "
        "79.00 GiB memory in use."
    )


class MemoryCeiling:
    """Makes ``compute_loss`` run out of memory above ``rows`` rows.

    Args:
        rows: the largest batch that fits.
        from_step: first step (from 1) at which the ceiling is there.
        phase: where it strikes. In ``backward`` after the gradient of the loss has begun to flow.
        steps_completed: tells how many steps are done, for instance ``lambda: guard.steps_completed``.
        times: how often it strikes at most; ``None``: always.

    Attributes:
        struck: how often it struck.
        samples: rows that were run, those of failed attempts included.
    """

    def __init__(
        self,
        rows: int,
        *,
        from_step: int = 1,
        phase: Literal["forward", "backward"] = "forward",
        steps_completed: Callable[[], int] = lambda: 0,
        times: int | None = None,
    ) -> None:
        self.rows = rows
        self.from_step = from_step
        self.phase = phase
        self.struck = 0
        self.samples = 0
        self._steps_completed = steps_completed
        self._times = times

    def __call__(self, compute_loss: ComputeLoss) -> ComputeLoss:
        """``compute_loss`` under this ceiling."""

        def limited(batch: Any) -> torch.Tensor:
            count = rows_of(batch)
            if torch.is_grad_enabled():
                self.samples += count
            if not self._strikes(count):
                return compute_loss(batch)
            self.struck += 1
            if self.phase == "forward":
                raise out_of_memory_error()
            loss: torch.Tensor = _FailInBackward.apply(compute_loss(batch))  # type: ignore[no-untyped-call]
            return loss

        return limited

    def _strikes(self, count: int) -> bool:
        reached = self._steps_completed() + 1 >= self.from_step and count > self.rows
        return reached and torch.is_grad_enabled() and (self._times is None or self.struck < self._times)


class FailingAllocation(TorchDispatchMode):
    """Makes an allocation inside its ``with`` block run out of memory, wherever in torch it is asked for.

    Counted are the operations that make a tensor, and fused optimizer kernels, which may lack memory to be loaded.

    Args:
        at: which allocation fails, from 1; ``None``: none by its number.
        times: how many in a row.
        above_bytes: those that make more bytes than this fail too, each time.

    Attributes:
        count: allocations asked for.
        struck: how many of them failed.
    """

    def __init__(self, at: int | None = None, *, times: int = 1, above_bytes: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self.struck = 0
        self._at = at
        self._times = times
        self._above_bytes = above_bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        aliased = any(argument.alias_info is not None for argument in func._schema.arguments)
        if (aliased and not func.__name__.startswith("_fused")) or func.namespace != "aten":
            return func(*args, **(kwargs or {}))
        self.count += 1
        if self._at is not None and self._at <= self.count < self._at + self._times:
            self.struck += 1
            raise out_of_memory_error()
        result = func(*args, **(kwargs or {}))
        if self._above_bytes is not None and _made_bytes(result) > self._above_bytes:
            self.struck += 1
            raise out_of_memory_error(requested_bytes=_made_bytes(result))
        return result


class NonFinite:
    """Makes the loss or the gradients of chosen steps (from 1) NaN or infinite."""

    def __init__(
        self,
        at_steps: Collection[int],
        *,
        what: Literal["loss", "gradient"] = "loss",
        value: float = float("nan"),
        steps_completed: Callable[[], int],
    ) -> None:
        self.at_steps = frozenset(at_steps)
        self.what = what
        self.value = value
        self._steps_completed = steps_completed

    def __call__(self, compute_loss: ComputeLoss) -> ComputeLoss:
        """``compute_loss`` with the fault."""

        def poisoned(batch: Any) -> torch.Tensor:
            loss = compute_loss(batch)
            if self._steps_completed() + 1 not in self.at_steps:
                return loss
            if self.what == "loss":
                return loss * self.value
            poisoned_loss: torch.Tensor = _PoisonGradient.apply(loss, self.value)  # type: ignore[no-untyped-call]
            return poisoned_loss

        return poisoned


def _made_bytes(result: Any) -> int:
    tensors = result if isinstance(result, (list, tuple)) else (result,)
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


class _FailInBackward(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(_ctx: Any, *_gradients: torch.Tensor) -> torch.Tensor:
        raise out_of_memory_error()


class _PoisonGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, value: float) -> torch.Tensor:
        ctx.value = value
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * ctx.value, None
