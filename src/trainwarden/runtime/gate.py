"""The gate before ``optimizer.step()``: a step with a non-finite loss or gradient never reaches the weights.

Two ways, chosen per optimizer with the reason stated. *Host*: one scalar is read before the step, and a bad step is not
called at all. *Device*: a fused optimizer honours ``found_inf`` (the contract of ``torch.amp.GradScaler``), so the
verdict stays on the device and nothing synchronises; its outcome is read when it has arrived, some steps later.
"""

from __future__ import annotations

import functools
import math
import types
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from trainwarden.guards.finite import StepFindings
from trainwarden.runtime.optimizer_step import PHASE as STEP_PHASE
from trainwarden.runtime.optimizer_step import OptimizerStep
from trainwarden.runtime.phases import SWITCHED_OFF, once_more
from trainwarden.runtime.sharded import group_of, local, summed
from trainwarden.runtime.shortage import shortage_of

T = TypeVar("T")

Mode = Literal["host", "device"]

_FINITE = StepFindings()
_NARROW = {torch.float32, torch.float16, torch.bfloat16}
_SMALL = 4096
"""Elements up to which copying tensors together is quicker than a kernel for each of them (measured: 100 tensors of
1,024 elements, 105 µs against 172)."""


def choose_mode(optimizer: torch.optim.Optimizer) -> tuple[Mode, str]:
    """How this optimizer's steps are checked, and why."""
    devices = {parameter.device.type for parameter in parameters_of(optimizer)}
    if devices <= {"cpu"}:
        return "host", "parameters are on the CPU, where reading a flag costs no synchronisation"
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        return "device", "a fused optimizer skips a bad step on the device"
    return (
        "host",
        "this optimizer cannot skip on the device: one value is read per step; fused=True avoids that",
    )


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside wrappers such as accelerate's ``AcceleratedOptimizer``."""
    while not hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    inner = getattr(optimizer, "optimizer", None)
    return unwrapped(inner) if isinstance(inner, torch.optim.Optimizer) else optimizer


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    """All parameters of all groups, as they are now: groups may be added during a run."""
    for group in optimizer.param_groups:
        yield from group["params"]


@dataclass
class _Pending:
    """Flags (loss bad, gradients bad) on their way from the device."""

    flags: Tensor
    ready: torch.cuda.Event | None
    step: int


class OptimizerGate:
    """Wraps one optimizer instance's ``step`` between `install` and `remove`.

    ``take_losses()`` hands over the losses (0-d tensors) that led to this step; ``on_called()`` is told of every call
    that came through. ``on_finished(parts, reason)`` is told of steps that ran out of memory and were finished, unless
    ``recover`` is False. Findings are collected by `poll`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        take_losses: Callable[[], Sequence[Tensor]],
        on_called: Callable[[], None],
        current_step: Callable[[], int],
        recover: bool = True,
        say: Callable[[str], None] = lambda _text: None,
        on_finished: Callable[[int, str], None] = lambda _parts, _reason: None,
        mode: Mode | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.mode, self.reason = (mode, "as asked") if mode else choose_mode(optimizer)
        self._take_losses = take_losses
        self._on_called = on_called
        self._current_step = current_step
        self._step = optimizer.step
        self._runner = OptimizerStep(optimizer, self._step, recover=recover, on_finished=on_finished)
        self._recover = recover
        self._say = say
        self._installed: types.MethodType | None = None
        self._arrived: list[tuple[int, StepFindings]] = []
        self._pending: deque[_Pending] = deque()

    def install(self) -> None:
        @functools.wraps(self._step)
        def step(_optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
            return self._step(*args, **kwargs) if self._installed is None else self._guarded_step(*args, **kwargs)

        # A bound method, because a scheduler built later wraps ``step.__func__``.
        self._installed = types.MethodType(step, self.optimizer)
        self.optimizer.step = self._installed  # type: ignore[method-assign]

    def remove(self) -> None:
        """Takes the wrapper off, or leaves it without effect when somebody has wrapped it since."""
        if vars(self.optimizer).get("step") is self._installed:
            del self.optimizer.step
            if self.optimizer.step != self._step:
                self.optimizer.step = self._step  # type: ignore[method-assign]
        self._installed = None

    def poll(self, *, wait: bool = False) -> list[tuple[int, StepFindings]]:
        """Findings that have arrived, as ``(step, findings)`` in order; with ``wait`` all, which synchronises."""
        arrived, self._arrived = self._arrived, []
        while self._pending and (wait or _is_ready(self._pending[0])):
            pending = self._pending.popleft()
            if pending.ready is not None:
                pending.ready.synchronize()
            loss_bad, gradients_bad = pending.flags.tolist()
            arrived.append((pending.step, StepFindings(not loss_bad, not gradients_bad)))
        return arrived

    @property
    def torn(self) -> bool:
        """Whether an update is half applied, or may be: such weights must not be saved."""
        return self._runner.torn

    # -- the wrapped step ----------------------------------------------------------------------------------------

    def _guarded_step(self, *args: Any, **kwargs: Any) -> Any:
        losses = self._take_losses()
        result = self._judged_step(losses, args, kwargs)
        self._on_called()  # only now: a step that raised is no step
        return result

    def _judged_step(self, losses: Sequence[Tensor], args: Sequence[Any], kwargs: Any) -> Any:
        if (args[0] if args else kwargs.get("closure")) is not None:
            return self._runner.run(*args, **kwargs)  # the closure computes the gradients: nothing is to be seen yet
        groups = self.optimizer.param_groups
        gradients = [grad for group in groups for p in group["params"] if (grad := p.grad) is not None]
        if self.mode == "host" or self._lacks_momentum(gradients):
            return self._step_on_host(losses, gradients, kwargs)
        return self._step_on_device(losses, gradients, kwargs)

    def _checked(self, gradients: Sequence[Tensor], check: Callable[[], T]) -> T:
        """What ``check()`` returns; it changes nothing, so it may be done again when memory runs out."""
        try:
            return check()
        except (RuntimeError, MemoryError) as error:
            shortage = shortage_of(STEP_PHASE, error)
        refusal = None if self._recover else SWITCHED_OFF
        if group_of(gradients) is not None:
            refusal = "every rank takes part in looking at distributed gradients"
        return once_more(STEP_PHASE, check, shortage, refusal=refusal, say=self._say)

    def _step_on_host(self, losses: Sequence[Tensor], gradients: Sequence[Tensor], kwargs: Any) -> Any:
        findings = self._checked(gradients, lambda: self._findings(losses, gradients))
        self._arrived.append((self._current_step(), findings))
        if findings.what is None:
            return self._runner.run(**kwargs)
        # A scheduler warns about a step that never came unless the optimizer counts as called.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        return None

    def _findings(self, losses: Sequence[Tensor], gradients: Sequence[Tensor]) -> StepFindings:
        if _looks_finite(gradients, losses):
            return _FINITE
        # A norm overflows above 1.8e19 although every element is finite: only an exact pass convicts.
        bad_loss = not all(bool(torch.isfinite(loss)) for loss in losses)
        bad_gradient = not all(bool(torch.isfinite(_values(g)).all()) for g in gradients)
        found = summed(torch.tensor([bad_loss, bad_gradient], dtype=torch.int32), group_of(gradients))
        return StepFindings(loss_finite=not found[0], gradients_finite=not found[1])

    def _step_on_device(self, losses: Sequence[Tensor], gradients: Sequence[Tensor], kwargs: Any) -> Any:
        scaler_found = getattr(self.optimizer, "found_inf", None)

        def verdict() -> tuple[Tensor, Tensor]:
            device = next((g.device for g in gradients), torch.device("cpu"))
            bad = torch.stack([_any_not_finite(losses, device), _any_not_finite_gradient(gradients, device)])
            group = group_of(gradients)
            if group is not None:
                bad = summed(bad.int(), group).bool()
            found = bad.any().float()
            return bad, found if scaler_found is None else torch.maximum(found, scaler_found.to(device))

        bad, merged = self._checked(gradients, verdict)
        self.optimizer.found_inf = merged  # type: ignore[attr-defined]
        try:
            return self._runner.run(**kwargs)
        finally:
            if scaler_found is None:
                del self.optimizer.found_inf  # type: ignore[attr-defined]
            else:
                self.optimizer.found_inf = scaler_found  # type: ignore[attr-defined]
            self._send(bad)

    def _send(self, bad: Tensor) -> None:
        if bad.device.type != "cuda":
            self._pending.append(_Pending(bad, None, self._current_step()))
            return
        host = torch.empty_like(bad, device="cpu", pin_memory=True)
        host.copy_(bad, non_blocking=True)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record()
        self._pending.append(_Pending(host, ready, self._current_step()))

    def _lacks_momentum(self, gradients: Sequence[Tensor]) -> bool:
        """Whether a fused SGD would leave its momentum uninitialised if its first step were skipped on the device.

        torch (2.13) allocates the buffers with ``empty_like`` and its kernel returns early under ``found_inf``.
        """
        if not isinstance(self.optimizer, torch.optim.SGD) or not gradients:
            return False
        return any(
            group["momentum"] != 0 and self.optimizer.state.get(p, {}).get("momentum_buffer") is None
            for group in self.optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        )


def _is_ready(pending: _Pending) -> bool:
    return pending.ready is None or bool(pending.ready.query())  # type: ignore[no-untyped-call]


def _values(gradient: Tensor) -> Tensor:
    """The numbers of a gradient that lie on this rank."""
    return gradient._values() if gradient.is_sparse else local(gradient)


def _looks_finite(gradients: Sequence[Tensor], losses: Sequence[Tensor]) -> bool:
    """False when anything may be non-finite, on any rank. One reduction at memory bandwidth and one value read.

    NaN and infinity survive addition; a sum that overflows only leads to the exact pass.
    """
    small: list[Tensor] = []
    large: list[Tensor] = []
    for tensor in (*losses, *gradients):
        if type(tensor) is not Tensor or not tensor.is_cpu or tensor.is_sparse or tensor.dtype not in _NARROW:
            return _looks_finite_anywhere(gradients, losses)
        (large if tensor.numel() > _SMALL else small).append(tensor)
    # In float32, since a half-precision norm overflows above 65,504.
    total = _flatten_dense_tensors(small).sum(dtype=torch.float32).item() if small else 0.0
    for norm in torch._foreach_norm(large, 2, torch.float32) if large else ():
        total += norm.item()
    return math.isfinite(total)


def _looks_finite_anywhere(gradients: Sequence[Tensor], losses: Sequence[Tensor]) -> bool:
    """`_looks_finite` for tensors of any kind, on any device, in pieces on several ranks."""
    plain = all(type(gradient) is Tensor for gradient in gradients)
    dense = [g if plain and not g.is_sparse else _values(g) for g in gradients]
    wide = any(gradient.dtype not in _NARROW for gradient in dense)  # keeps its own type
    norms = list(torch._foreach_norm(dense, 2, None if wide else torch.float32)) if dense else []
    first = norms[0] if norms else losses[0]
    norms = [norm.to(first) for norm in norms]
    total = float(torch.stack([*norms, *(loss.to(first).reshape(()) for loss in losses)]).sum())
    if plain:
        return math.isfinite(total)
    group = group_of(gradients)
    if group is not None:
        total = float(summed(torch.tensor(total, dtype=torch.float64), group))
    return math.isfinite(total)


def _any_not_finite(losses: Sequence[Tensor], device: torch.device) -> Tensor:
    if not losses:
        return torch.zeros((), dtype=torch.bool, device=device)
    return ~torch.stack([loss.to(device).float().reshape(()) for loss in losses]).isfinite().all()


def _any_not_finite_gradient(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    values = [numbers for numbers in map(_values, gradients) if numbers.numel()]  # of nothing there is no maximum
    if not values:
        return torch.zeros((), dtype=torch.bool, device=device)
    # The maximum norm cannot overflow, so the verdict is exact without a second pass.
    norm = torch.nn.utils.get_total_norm(values, float("inf"))
    return ~norm.to(device).isfinite()
