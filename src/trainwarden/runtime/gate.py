"""The gate before ``optimizer.step()``: a step with a non-finite loss or gradient never reaches the weights.

Three ways, chosen per optimizer with the reason stated. *Host*: one scalar is read before the step, and a bad step is
not called at all. *Device*: a fused optimizer honours ``found_inf`` (the contract of ``torch.amp.GradScaler``), so the
verdict stays on the device and nothing synchronises; its outcome is read when it has arrived, some steps later. *Late*,
where the policy asks for it: the step is taken before the verdict is in, and a bad one has reached the weights.
"""

from __future__ import annotations

import functools
import math
import types
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from trainwarden.errors import GPUMemoryError
from trainwarden.guards.finite import Culprit, Detection, Kind, StepFindings
from trainwarden.runtime.clipping import Clipping
from trainwarden.runtime.culprit import LOSS, first_culprit, is_finite
from trainwarden.runtime.finite_check import largest_magnitudes, looks_finite, losses_bad, norms_of
from trainwarden.runtime.optimizer_step import PHASE as STEP_PHASE
from trainwarden.runtime.optimizer_step import OptimizerStep
from trainwarden.runtime.phases import SWITCHED_OFF, once_more
from trainwarden.runtime.sharded import group_of, summed
from trainwarden.runtime.shortage import shortage_of

T = TypeVar("T")

Mode = Literal["host", "device", "late"]

_FINITE = StepFindings()


def choose_mode(optimizer: torch.optim.Optimizer, detection: Detection = "before_step") -> tuple[Mode, str]:
    """How this optimizer's steps are checked, and why."""
    devices = {parameter.device.type for parameter in parameters_of(optimizer)}
    if devices <= {"cpu"} and detection == "before_step":
        return "host", "parameters are on the CPU, where reading a flag costs no synchronisation"
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        return "device", "a fused optimizer skips a bad step on the device"
    if detection == "late":
        return "late", "this optimizer cannot skip on the device, and nobody waits: a bad step is seen once it is done"
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
    """A report on its way from the device: two flags (loss bad, gradients bad), the losses, and of each gradient its
    largest magnitude, or its norm before clipping."""

    report: Tensor
    ready: torch.cuda.Event | None
    step: int
    losses: int
    parameters: list[Tensor]
    applied: bool

    def findings(self, name_of: Callable[[Tensor], str]) -> StepFindings:
        """What the report says, once it is there."""
        values = self.report.tolist()
        loss_bad, gradients_bad = bool(values[0]), bool(values[1])
        if not loss_bad and not gradients_bad:
            return _FINITE
        losses, magnitudes = values[2 : 2 + self.losses], values[2 + self.losses :]
        culprit: Culprit | None = None
        for index, loss in enumerate(losses):
            if not math.isfinite(loss):
                kind: Kind = "nan" if math.isnan(loss) else "+inf" if loss > 0 else "-inf"
                culprit = culprit or Culprit(LOSS, kind, index, self.losses)
        for parameter, magnitude in zip(self.parameters, magnitudes, strict=True):
            if culprit is None and not math.isfinite(magnitude):
                kind = "nan" if math.isnan(magnitude) else "inf"
                culprit = Culprit(name_of(parameter), kind, 0 if self.losses == 1 else None, self.losses)
        return StepFindings(not loss_bad, not gradients_bad, culprit=culprit, applied=self.applied)


class OptimizerGate:
    """Wraps one optimizer instance's ``step`` between `install` and `remove`.

    ``take_losses()`` hands over the losses (0-d tensors) that led to this step; ``on_called()`` is told of every call
    that came through. ``on_finished(parts, reason)`` is told of steps that ran out of memory and were finished, unless
    ``recover`` is False. Findings are collected by `poll`. ``name_of(parameter)`` names a culprit. ``on_norms(norms)``
    is given the norms of the gradients of every step, unscaled, 0-d each on their device; by default none are taken.
    A step that cannot be finished raises, unless ``leave_later(error)`` says that the run will end with that error a
    little later.
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
        name_of: Callable[[Tensor], str] = lambda _parameter: "parameter",
        on_norms: Callable[[Sequence[Tensor]], None] | None = None,
        leave_later: Callable[[GPUMemoryError], bool] = lambda _error: False,
        detection: Detection = "before_step",
        mode: Mode | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.clipping: Clipping | None = None
        """What the clipping of this step has measured, until the step."""
        self._name_of = name_of
        self._on_norms = on_norms
        self.mode, self.reason = (mode, "as asked") if mode else choose_mode(optimizer, detection)
        self._take_losses = take_losses
        self._on_called = on_called
        self._current_step = current_step
        self._step = optimizer.step
        self._runner = OptimizerStep(optimizer, self._step, recover=recover, on_finished=on_finished)
        self._recover = recover
        self._leave_later = leave_later
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
            arrived.append((pending.step, pending.findings(self._name_of)))
        return arrived

    def count_as_called(self) -> None:
        """A scheduler warns about a step that never came unless its optimizer counts as called."""
        self.optimizer._opt_called = True  # type: ignore[attr-defined]

    def overflow(self, losses: Sequence[Tensor]) -> StepFindings:
        """The findings about a step that a ``GradScaler`` left out, for what it saw in the gradients."""
        culprit = self._culprit(losses, self._take_clipping())
        return StepFindings(culprit is None or culprit.tensor != LOSS, False, culprit=culprit)

    @property
    def torn(self) -> bool:
        """Whether an update is half applied, or may be: such weights must not be saved."""
        return self._runner.torn

    # -- the wrapped step ----------------------------------------------------------------------------------------

    def _guarded_step(self, *args: Any, **kwargs: Any) -> Any:
        losses = self._take_losses()
        try:
            result = self._judged_step(losses, args, kwargs)
        except GPUMemoryError as error:
            if not self._leave_later(error):
                raise
            result = None
        self._on_called()  # only now: a step that raised is no step
        return result

    def _judged_step(self, losses: Sequence[Tensor], args: Sequence[Any], kwargs: Any) -> Any:
        if (args[0] if args else kwargs.get("closure")) is not None:
            return self._runner.run(*args, **kwargs)  # the closure computes the gradients: nothing is to be seen yet
        clipping = None if self.clipping is None else self._take_clipping()
        groups = self.optimizer.param_groups
        gradients = [grad for group in groups for p in group["params"] if (grad := p.grad) is not None]
        if self.mode == "host" or self._lacks_momentum(gradients):
            return self._step_on_host(losses, gradients, clipping, kwargs)
        return self._step_unread(losses, gradients, clipping, kwargs)

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

    def _take_clipping(self) -> Clipping | None:
        """What is known of this step's gradients from their clipping, if nobody has changed them since."""
        clipping, self.clipping = self.clipping, None
        gradients = [p.grad for p in parameters_of(self.optimizer) if p.grad is not None]
        return clipping if clipping is not None and clipping.covers(gradients) else None

    def _step_on_host(
        self, losses: Sequence[Tensor], gradients: Sequence[Tensor], clipping: Clipping | None, kwargs: Any
    ) -> Any:
        findings = self._checked(gradients, lambda: self._findings(losses, gradients, clipping))
        self._arrived.append((self._current_step(), findings))
        if findings.what is None:
            return self._runner.run(**kwargs)
        self.count_as_called()
        return None

    def _findings(
        self, losses: Sequence[Tensor], gradients: Sequence[Tensor], clipping: Clipping | None
    ) -> StepFindings:
        seen = gradients
        if clipping is not None:
            seen = (clipping.norm,)
        elif self._on_norms is not None:
            norms = self._told_norms(gradients)
            seen = norms if group_of(gradients) is None else gradients
        if looks_finite(seen, losses):
            return _FINITE
        # A norm overflows above 1.8e19 although every element is finite: only an exact pass convicts.
        culprit = self._culprit(losses, clipping)
        bad_loss = culprit is not None and culprit.tensor == LOSS
        bad_gradient = culprit is not None and (not bad_loss or not all(map(is_finite, gradients)))
        found = summed(torch.tensor([bad_loss, bad_gradient], dtype=torch.int32), group_of(gradients))
        return StepFindings(not found[0], not found[1], culprit=culprit)

    def _culprit(self, losses: Sequence[Tensor], clipping: Clipping | None) -> Culprit | None:
        """By an exact pass; what clipping has spoiled is told by what it measured before."""
        parameters = [p for p in parameters_of(self.optimizer) if p.grad is not None]
        culprit = first_culprit(losses, ((self._name_of(p), p.grad) for p in parameters if p.grad is not None))
        if clipping is None or culprit is None or culprit.tensor == LOSS:
            return culprit
        spoiled = clipping.first_bad()
        owner = next((p for p in parameters if spoiled is not None and p.grad is spoiled[0]), None)
        if spoiled is None or owner is None:
            return culprit
        return replace(culprit, tensor=self._name_of(owner), kind=spoiled[1])

    def _told_norms(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """The norms of the gradients, after somebody was told them without the ``GradScaler``'s factor."""
        norms = norms_of(gradients)
        scale = getattr(self.optimizer, "grad_scale", None)
        if self._on_norms is not None:
            self._on_norms(norms if scale is None else [norm / scale.to(norm.device) for norm in norms])
        return norms

    def _step_unread(
        self, losses: Sequence[Tensor], gradients: Sequence[Tensor], clipping: Clipping | None, kwargs: Any
    ) -> Any:
        """A step whose verdict nobody on the host waits for: it goes to a fused optimizer, or is only read late."""
        scaler_found = getattr(self.optimizer, "found_inf", None)
        bad, report = self._checked(gradients, lambda: self._verdict(losses, gradients, clipping))
        if self._on_norms is not None and clipping is None:
            self._checked(gradients, lambda: self._told_norms(gradients))
        try:
            if self.mode == "device":
                found = bad.any().float()
                merged = found if scaler_found is None else torch.maximum(found, scaler_found.to(found.device))
                self.optimizer.found_inf = merged  # type: ignore[attr-defined]
            return self._runner.run(**kwargs)
        finally:
            if scaler_found is not None:
                self.optimizer.found_inf = scaler_found  # type: ignore[attr-defined]
            elif self.mode == "device":
                del self.optimizer.found_inf  # type: ignore[attr-defined]
            self._send(report, len(losses))

    def _verdict(
        self, losses: Sequence[Tensor], gradients: Sequence[Tensor], clipping: Clipping | None
    ) -> tuple[Tensor, Tensor]:
        """Two flags (loss bad, gradients bad), the same on every rank, and the report that is read later."""
        device = next((g.device for g in gradients), torch.device("cpu"))
        magnitudes = largest_magnitudes(gradients, device)
        bad = torch.stack([losses_bad(losses, device), ~magnitudes.isfinite().all()])
        bad = summed(bad.int(), group_of(gradients)).bool()
        if clipping is not None and clipping.parts is not None:  # after it all are NaN; before it one was
            parts = {id(gradient): part for gradient, part in zip(clipping.gradients, clipping.parts, strict=True)}
            magnitudes = torch.stack([parts[id(gradient)] for gradient in gradients]).float()
        return bad, torch.cat([bad.float(), *(loss.to(device).float().reshape(1) for loss in losses), magnitudes])

    def _send(self, report: Tensor, losses: int) -> None:
        parameters = [p for p in parameters_of(self.optimizer) if p.grad is not None]
        pending = _Pending(report, None, self._current_step(), losses, parameters, applied=self.mode == "late")
        if report.device.type == "cuda":
            pending.report = torch.empty_like(report, device="cpu", pin_memory=True)
            pending.report.copy_(report, non_blocking=True)
            pending.ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            pending.ready.record()
        self._pending.append(pending)

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
