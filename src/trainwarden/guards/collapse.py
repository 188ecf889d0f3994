"""Collapse: a representation that degenerates while the loss goes on falling.

Three figures tell it, each in a way of its own: the mean variance of the dimensions (VICReg's hinge; Bardes et al.
2022) falls when all samples become the same, the effective rank (RankMe; Garrido et al. 2023: the exponential of the
entropy of the normalised singular values) when they keep to a few directions, the mean distance of two samples when
they huddle. None of them has an absolute scale, so each is compared with what it was when the run was healthy.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

from trainwarden.guards.settings import require

_require = partial(require, "collapse")

Criterion = Literal["variance", "effective_rank", "pairwise_distance"]
CRITERIA: tuple[Criterion, ...] = ("variance", "effective_rank", "pairwise_distance")
CollapseAction = Literal["announce", "abort"]


@dataclass(frozen=True)
class Spread:
    """How spread out the samples of a representation are. All are 0 or more; NaN is unknown."""

    variance: float
    """Mean over the dimensions of the variance over the samples."""
    effective_rank: float
    """From 1 to the number of dimensions."""
    pairwise_distance: float
    """Mean Euclidean distance of two samples."""


@dataclass(frozen=True)
class CollapseState:
    """What is remembered of one representation."""

    first: Spread | None = None
    """The first measurement, with which later ones are compared."""
    low: tuple[int, int, int] = (0, 0, 0)
    """For each criterion, measurements below its threshold in a row."""
    told: bool = False


@dataclass(frozen=True)
class Collapse:
    """``criterion`` was below its threshold for ``measurements`` in a row."""

    criterion: Criterion
    value: float
    threshold: float
    measurements: int


@dataclass(frozen=True)
class CollapsePolicy:
    """When a representation has collapsed, and what is done about it.

    A figure is low below its share of the first measured one; the variance, where there is a reference (the targets
    that the representation predicts), below its share of the reference's. The defaults for variance, distance and
    interval are those of GenoLeWM's CollapseMonitor, whose error model names the condition; it has no patience, and the
    rank is taken by the same share. ``patience`` measurements in a row make a collapse.

    Raises InvalidSettingError for a value out of range.
    """

    action: CollapseAction = "abort"
    every_steps: int = 500
    patience: int = 3
    variance_share: float = 0.5
    effective_rank_share: float = 0.5
    pairwise_distance_share: float = 0.5

    def __post_init__(self) -> None:
        _require(self.action in ("announce", "abort"), "action", self.action, "announce or abort")
        _require(self.every_steps >= 1, "every_steps", self.every_steps, "at least 1")
        _require(self.patience >= 1, "patience", self.patience, "at least 1")
        for criterion in CRITERIA:
            share = self.share(criterion)
            _require(0 <= share < 1, f"{criterion}_share", share, "at least 0 and below 1")

    def share(self, criterion: Criterion) -> float:
        share: float = getattr(self, f"{criterion}_share")
        return share

    def step(
        self, state: CollapseState, spread: Spread, reference_variance: float | None = None
    ) -> tuple[CollapseState, Collapse | None]:
        """The state after a measurement, and the collapse that it completes; each collapse is shown once.

        A figure that is not finite ends no count and begins none: it says nothing about collapse.
        """
        if state.first is None and not all(map(math.isfinite, asdict(spread).values())):
            return state, None
        first = state.first or spread
        thresholds = {criterion: self.share(criterion) * getattr(first, criterion) for criterion in CRITERIA}
        if reference_variance is not None and math.isfinite(reference_variance):
            thresholds["variance"] = self.variance_share * reference_variance
        values = {criterion: getattr(spread, criterion) for criterion in CRITERIA}
        low = tuple(
            count if not math.isfinite(values[c]) else count + 1 if values[c] < thresholds[c] else 0
            for c, count in zip(CRITERIA, state.low, strict=True)
        )
        state = replace(state, first=first, low=(low[0], low[1], low[2]))
        worst = max(range(len(CRITERIA)), key=lambda index: low[index])
        if low[worst] < self.patience:
            return (replace(state, told=False) if state.told and not any(low) else state), None
        if state.told:
            return state, None
        criterion = CRITERIA[worst]
        return replace(state, told=True), Collapse(criterion, values[criterion], thresholds[criterion], low[worst])
