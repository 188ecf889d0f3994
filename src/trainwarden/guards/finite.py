"""Non-finite losses and gradients: which step is skipped, and when skipping has gone on for too long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

What = Literal["loss", "gradient"]


@dataclass(frozen=True)
class StepFindings:
    """What was seen in one step. ``loss_scale`` is the ``GradScaler``'s factor, ``None`` without one."""

    loss_finite: bool = True
    gradients_finite: bool = True
    loss_scale: float | None = None

    @property
    def what(self) -> What | None:
        """The first thing that was not finite; a non-finite loss also spoils the gradients, so it is named first."""
        if not self.loss_finite:
            return "loss"
        return None if self.gradients_finite else "gradient"


@dataclass(frozen=True)
class FinitePolicy:
    """A step with a non-finite loss or gradient is skipped; more than ``max_skipped_in_a_row`` end the run."""

    max_skipped_in_a_row: int = 5

    def next_streak(self, streak: int, findings: StepFindings) -> int:
        """Length of the run of bad steps after this one.

        A ``GradScaler`` finds its scale by overflowing: while it still has room to go down, an overflow of scaled
        gradients under a finite loss is its ordinary business and leaves the streak as it is.
        """
        if findings.what is None:
            return 0
        searching = findings.loss_scale is not None and findings.loss_scale > 1.0
        if findings.what == "gradient" and searching:
            return streak
        return streak + 1

    def exhausted(self, streak: int) -> bool:
        return streak > self.max_skipped_in_a_row
