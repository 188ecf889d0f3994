"""Going back: which checkpoint a run returns to, which batches it then leaves out, and how often it may.

PaLM's remedy for loss spikes (Chowdhery et al. 2022, section 5.1): restart from a checkpoint of some 100 steps before
the spike and skip 200 to 500 batches around it. The same data from another state of the weights did not spike again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trainwarden.errors import InvalidSettingError


@dataclass(frozen=True, order=True)
class Place:
    """A position in the data: between two batches. ``phase`` counts the loaders that a run uses in turn."""

    phase: int
    epoch: int
    batch_index: int


@dataclass(frozen=True)
class Window:
    """Batches to leave out: from ``begin`` up to, not including, ``end``."""

    begin: Place
    end: Place

    def holds(self, place: Place) -> bool:
        return self.begin <= place < self.end


@dataclass(frozen=True)
class Rollback:
    """One return, as it is written down in the run before anything else happens.

    A run that starts with it goes on from a checkpoint of at most ``checkpoint_step`` steps.
    """

    window: Window
    checkpoint_step: int
    first_step: int
    last_step: int
    learning_rate_factor: float
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable; `from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rollback:
        """Raises KeyError or TypeError for what `to_dict` has not written."""
        window = Window(Place(**data["window"]["begin"]), Place(**data["window"]["end"]))
        return cls(**{**data, "window": window})


@dataclass(frozen=True)
class RollbackPolicy:
    """How a run goes back, whichever detector asks for it.

    ``skip_steps_before``: steps before the first suspicious one whose batches are left out with it; what spoils the
    weights is often the batch before the one that shows it. ``learning_rate_factor`` multiplies all learning rates from
    then on, each time anew. ``max_rollbacks`` counts those of the whole run, over all its restarts.

    Raises InvalidSettingError for a value out of range.
    """

    max_rollbacks: int = 3
    skip_steps_before: int = 10
    learning_rate_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.max_rollbacks < 1:
            raise InvalidSettingError(setting="rollback.max_rollbacks", value=self.max_rollbacks, expected="at least 1")
        if self.skip_steps_before < 0:
            value = self.skip_steps_before
            raise InvalidSettingError(setting="rollback.skip_steps_before", value=value, expected="at least 0")
        factor = self.learning_rate_factor
        if not 0 < factor <= 1:
            expected = "above 0 and at most 1"
            raise InvalidSettingError(setting="rollback.learning_rate_factor", value=factor, expected=expected)

    def refusal(self, done: int) -> str | None:
        """Why a run that has gone back ``done`` times may not do so again."""
        return f"it has gone back {done} times already" if done >= self.max_rollbacks else None

    def plan(
        self,
        *,
        first_step: int,
        last_step: int,
        places: Mapping[int, Place],
        end: Place,
        checkpoints: Sequence[int],
        reason: str,
    ) -> Rollback | None:
        """What to do about steps ``first_step`` to ``last_step``; ``None``: nothing from before them is known.

        Args:
            first_step: the first suspicious optimizer step, from 1.
            last_step: the last one.
            places: where the data stood after a step, for as many past steps as are remembered.
            end: where it stood after ``last_step``.
            checkpoints: steps completed of each that may be returned to.
            reason: for people.
        """
        earlier = [step for step in checkpoints if step < first_step]
        known = sorted(step for step in places if step < first_step)
        if not earlier or not known:
            return None
        wished = max(0, first_step - 1 - self.skip_steps_before)
        # As far back as wished, or as remembered: the batches of a step that nobody remembers cannot be named.
        began = next((step for step in known if step >= wished), known[-1])
        # A checkpoint inside the window holds some of its batches already; it is second best.
        checkpoint = max([step for step in earlier if step <= began] or earlier)
        return Rollback(
            window=Window(places[began], end),
            checkpoint_step=checkpoint,
            first_step=first_step,
            last_step=last_step,
            learning_rate_factor=self.learning_rate_factor,
            reason=reason,
        )


def skipped(windows: Iterable[Window], place: Place) -> bool:
    """Whether the batch after ``place`` is in any of the windows."""
    return any(window.holds(place) for window in windows)
