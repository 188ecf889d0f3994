"""Optimizer steps as the guard sees them: when one happened, whether a gradient is pending, and what was not finite."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from trainwarden.errors import GPUMemoryError
from trainwarden.guards.finite import Detection, StepFindings
from trainwarden.runtime.clipping import Clipping
from trainwarden.runtime.gate import OptimizerGate, unwrapped
from trainwarden.runtime.late_values import LateValues
from trainwarden.runtime.watched import Watched


class StepWatch:
    """Watches all optimizers and the ``GradScaler`` of a run between `install` and `remove`.

    ``values``, where somebody wants them, is given the losses and gradient norms of each step.
    """

    def __init__(
        self,
        watched: Watched,
        *,
        current_step: Callable[[], int],
        recover: bool = True,
        say: Callable[[str], None] = lambda _text: None,
        on_finished: Callable[[int, str], None] = lambda _parts, _reason: None,
        leave_later: Callable[[GPUMemoryError], bool] = lambda _error: False,
        detection: Detection = "before_step",
        values: LateValues | None = None,
    ) -> None:
        self.spoiled = False
        """Whether this rank has left out or halved an update that the others have made."""
        self.gradient_pending = False
        """Whether a backward pass came after the last optimizer step."""
        self._losses: list[Tensor] = []
        self._last_loss: Tensor | None = None
        self._called = False
        self._values = values
        self._scaler = watched.scaler
        self._scaler_findings: list[tuple[int, StepFindings]] = []
        self._current_step: Callable[[], int] = lambda: current_step() + 1
        self._gates = [
            OptimizerGate(
                optimizer,
                take_losses=self._take_losses,
                on_called=self._note_called,
                current_step=self._current_step,
                recover=recover,
                say=say,
                on_finished=on_finished,
                leave_later=leave_later,
                name_of=watched.name_of,
                on_norms=values.note_norms if values is not None else None,
                detection=detection,
            )
            for optimizer in watched.optimizers.values()
        ]
        self._installed = False

    def install(self) -> list[str]:
        """Hooks everything; returns what should be said about how steps are checked."""
        for gate in self._gates:
            gate.install()
        if self._scaler is not None:
            self._hook_scaler(self._scaler)
        self._installed = True
        return [
            f"{type(gate.optimizer).__name__}: {gate.reason}" for gate in self._gates if "fused=True" in gate.reason
        ]

    def remove(self) -> None:
        if not self._installed:
            return
        self._installed = False
        for gate in self._gates:
            gate.remove()
        if self._scaler is not None:
            del self._scaler.step

    def note_backward(self, loss: Tensor, loss_of_ranks: Tensor | None = None) -> None:
        """``loss_of_ranks``: the sum over ranks by which all of them judge the step; by default the loss itself."""
        self._losses.append(loss if loss_of_ranks is None else loss_of_ranks)
        self._last_loss = loss
        self.gradient_pending = True

    def note_clipping(self, clipping: Clipping) -> None:
        """The gradients were clipped; what that has measured need not be measured again before the step."""
        for gate in self._gates:
            gate.clipping = clipping
        if self._values is not None:
            self._values.note_clipping(clipping.norm)

    @property
    def in_flight(self) -> bool:
        """Whether verdicts arrive later than at the end of their step."""
        return any(gate.mode != "host" for gate in self._gates)

    def final_loss(self) -> float | None:
        """Loss of the last batch; reading it synchronises, so only for the end of a run. ``None``: unknown."""
        try:
            return None if self._last_loss is None else float(self._last_loss)
        except RuntimeError:  # a device that failed answers no more, and that must not hide why the run ends
            return None

    @property
    def torn(self) -> bool:
        """Whether an update is half applied, or may be: such weights must not be saved."""
        return self.spoiled or any(gate.torn for gate in self._gates)

    def take_completed(self) -> bool:
        """Whether an optimizer was stepped since the last call."""
        called, self._called = self._called, False
        return called

    def poll(self, *, wait: bool = False) -> list[tuple[int, StepFindings]]:
        """Findings that have arrived, one a step: with several optimizers a step is bad when any of them was."""
        found = [item for gate in self._gates for item in gate.poll(wait=wait)]
        if self._scaler_findings:
            found += self._scaler_findings
            self._scaler_findings = []
        if len(found) == 1 and found[0][1].what is None:
            return found
        merged: dict[int, StepFindings] = {}
        for step, findings in found:
            merged[step] = merged[step].merged(findings) if step in merged else findings
        return [(step, self._with_scale(merged[step])) for step in sorted(merged)]

    def _with_scale(self, findings: StepFindings) -> StepFindings:
        if findings.what is None or self._scaler is None:
            return findings
        return replace(findings, loss_scale=float(self._scaler.get_scale()))  # synchronises, after a bad step only

    def _take_losses(self) -> list[Tensor]:
        losses, self._losses = self._losses, []
        if self._values is not None:
            self._values.note_losses(losses)
        return losses

    def _note_called(self) -> None:
        self._called = True
        self.gradient_pending = False

    def _hook_scaler(self, scaler: Any) -> None:
        """An unfused optimizer's ``step`` is not called when the scaler finds an overflow; the step counts still."""
        original = scaler.step

        @functools.wraps(original)
        def step(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            self._called = False
            result = original(optimizer, *args, **kwargs)
            if not self._called:
                gate = next(gate for gate in self._gates if gate.optimizer is unwrapped(optimizer))
                gate.count_as_called()
                self._scaler_findings.append((self._current_step(), gate.overflow(self._take_losses())))
                self._note_called()
            return result

        scaler.step = step
