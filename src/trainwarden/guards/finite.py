"""Non-finite losses and gradients: which step is left out, and when leaving out has gone on for too long."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from trainwarden.guards.settings import require

_require = partial(require, "finite")

What = Literal["loss", "gradient"]
Kind = Literal["nan", "+inf", "-inf", "inf"]
"""``inf``: an infinity whose sign is not known, since only the largest magnitude of the tensor was kept."""
FiniteAction = Literal["skip", "rollback", "abort"]
Detection = Literal["before_step", "late"]
Limit = Literal["streak", "share", "first", "late"]
"""What made a bad step the last one: too many in a row, too many of the last steps, the first one, or one that has
reached the weights before it was seen."""


@dataclass(frozen=True)
class Culprit:
    """The first tensor that was not finite, found by an exact pass after the alarm."""

    tensor: str
    """Name of the parameter whose gradient it is, or ``loss``."""
    kind: Kind
    micro_batch: int | None = None
    """Which backward pass of the step it came from, from 0; ``None`` where several may have."""
    micro_batches: int = 0
    """How many backward passes the step had."""


@dataclass(frozen=True)
class StepFindings:
    """What was seen in one step. ``loss_scale`` is the ``GradScaler``'s factor, ``None`` without one."""

    loss_finite: bool = True
    gradients_finite: bool = True
    loss_scale: float | None = None
    culprit: Culprit | None = None
    applied: bool = False
    """Whether the optimizer has stepped all the same: the weights are spoiled."""

    @property
    def what(self) -> What | None:
        """The first thing that was not finite; a non-finite loss also spoils the gradients, so it is named first."""
        if not self.loss_finite:
            return "loss"
        return None if self.gradients_finite else "gradient"

    def merged(self, other: StepFindings) -> StepFindings:
        """The findings of two optimizers about the same step: it is bad when either was; the first culprit stands."""
        return StepFindings(
            self.loss_finite and other.loss_finite,
            self.gradients_finite and other.gradients_finite,
            self.loss_scale if other.loss_scale is None else other.loss_scale,
            self.culprit or other.culprit,
            self.applied or other.applied,
        )


@dataclass(frozen=True)
class SkippedSteps:
    """What is remembered of the steps so far."""

    streak: int = 0
    """Bad steps in a row, up to now."""
    streak_began: int = 0
    """The first step of the streak, or the last bad one's."""
    recent: tuple[int, ...] = ()
    """Bad steps within the window over which their share is taken."""

    def told(self, step: int) -> bool:
        """Whether ``step`` is known to be bad: with several optimizers it may be reported more than once."""
        return bool(self.recent) and self.recent[-1] == step


NONE_SKIPPED = SkippedSteps()


@dataclass(frozen=True)
class FiniteVerdict:
    """The run cannot simply go on. ``first_step``: where the trouble began."""

    action: Literal["rollback", "abort"]
    limit: Limit
    first_step: int


@dataclass(frozen=True)
class FinitePolicy:
    """What is done about a step with a non-finite loss or gradient.

    ``skip`` leaves it out, and ends the run at a limit: more than ``max_skipped_in_a_row`` in a row, or more than
    ``max_skipped_share`` of the last ``share_window_steps`` steps (``None``: no such limit). ``rollback`` leaves it out
    too, and at a limit goes back to the last checkpoint from before the trouble and trains on without the batches of
    that time. ``abort`` ends the run at the first bad step.

    ``detection="late"`` does not wait for the verdict before an optimizer steps that cannot skip on the device: no
    synchronisation, but the first bad step reaches the weights. It therefore goes with ``rollback`` or ``abort`` only.

    Raises InvalidSettingError for a limit out of range.
    """

    max_skipped_in_a_row: int = 5
    action: FiniteAction = "skip"
    max_skipped_share: float | None = 0.1
    share_window_steps: int = 200
    detection: Detection = "before_step"

    def __post_init__(self) -> None:
        share = self.max_skipped_share
        _require(self.max_skipped_in_a_row >= 0, "max_skipped_in_a_row", self.max_skipped_in_a_row, "at least 0")
        _require(self.action in ("skip", "rollback", "abort"), "action", self.action, "skip, rollback or abort")
        _require(share is None or 0 < share <= 1, "max_skipped_share", share, "above 0 and at most 1, or None")
        _require(self.share_window_steps >= 1, "share_window_steps", self.share_window_steps, "at least 1")
        _require(self.detection in ("before_step", "late"), "detection", self.detection, "before_step or late")
        late_skip = self.detection == "late" and self.action == "skip"
        _require(not late_skip, "detection", "late", "before_step with action skip: a late verdict cannot skip")

    def after(self, history: SkippedSteps, step: int, findings: StepFindings) -> SkippedSteps:
        """The history with this step in it.

        A ``GradScaler`` finds its scale by overflowing: while it still has room to go down, an overflow of scaled
        gradients under a finite loss is its ordinary business and leaves the history as it is.
        """
        if history.streak and history.told(step):
            return history
        if findings.what is None:
            return replace(history, streak=0) if history.streak else history
        searching = findings.loss_scale is not None and findings.loss_scale > 1.0
        if findings.what == "gradient" and searching:
            return history
        recent = (*(bad for bad in history.recent if bad > step - self.share_window_steps), step)
        return SkippedSteps(history.streak + 1, history.streak_began if history.streak else step, recent)

    def verdict(self, history: SkippedSteps, step: int, findings: StepFindings) -> FiniteVerdict | None:
        """What has to be done after ``step``, of which ``history`` knows already; ``None``: go on."""
        if findings.what is None:
            return None
        ending: Literal["rollback", "abort"] = "rollback" if self.action == "rollback" else "abort"
        if findings.applied:
            return FiniteVerdict(ending, "late", step)
        if not history.told(step):  # the scaler's own business
            return None
        if self.action == "abort":
            return FiniteVerdict("abort", "first", step)
        if history.streak > self.max_skipped_in_a_row:
            return FiniteVerdict(ending, "streak", history.streak_began)
        share = self.max_skipped_share
        if share is not None and len(history.recent) > share * self.share_window_steps:
            return FiniteVerdict(ending, "share", history.recent[0])
        return None
