"""The numbers of a run, looked at between two steps: what was not finite, what spiked, what collapsed.

The decisions are those of `guards.finite`, `guards.spikes` and `guards.collapse`; this file brings them their
observations, tells what they found, and makes the error that ends a run. Going back is `Returns`' business.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainwarden.errors import CollapseDetectedError, LossSpikeError, NaNLossError, StateNotFiniteError, WardenError
from trainwarden.events import CollapseDetected, Event, SpikeDetected, StepSkipped
from trainwarden.guards.collapse import Collapse
from trainwarden.guards.finite import NONE_SKIPPED, FinitePolicy, FiniteVerdict, SkippedSteps, StepFindings
from trainwarden.guards.rollback import Place, RollbackPolicy
from trainwarden.guards.spikes import Spike, SpikeDetector, SpikePolicy
from trainwarden.runtime.late_values import LateValues, both_finite
from trainwarden.runtime.position import DataPosition
from trainwarden.runtime.representation import Representation
from trainwarden.runtime.samples import samples_of
from trainwarden.runtime.state_check import first_bad_state
from trainwarden.runtime.steps import StepWatch
from trainwarden.runtime.watched import Watched

_REMEMBERED_STEPS = 4096
"""Of which the place in the data is known, where anything may ask for it later."""


@dataclass(frozen=True)
class NumberPolicies:
    """What is watched and what is done about it. ``spikes=None`` looks for none."""

    finite: FinitePolicy
    spikes: SpikePolicy | None
    rollback: RollbackPolicy

    @property
    def may_go_back(self) -> bool:
        return self.finite.action == "rollback" or (self.spikes is not None and self.spikes.action == "rollback")


@dataclass(frozen=True)
class Trouble:
    """Why the run cannot simply go on.

    ``first_step`` is set where the policy is to go back to before it; ``error`` ends the run where that cannot be.
    ``spoiled``: the weights have it in them, and are not saved.
    """

    error: WardenError
    spoiled: bool
    first_step: int | None = None
    last_step: int = 0
    """The last step that showed it; what came after is innocent."""
    reason: str = ""


@dataclass(frozen=True)
class _Found:
    """Where in the data a culprit came from, as far as it is known."""

    micro_batch: int | None = None
    epoch: int | None = None
    batch_index: int | None = None
    samples: tuple[int, ...] | None = None


@dataclass
class Trail:
    """Where the data stood after each of the last steps."""

    places: dict[int, Place] = field(default_factory=dict)
    _order: deque[int] = field(default_factory=deque)

    def note(self, step: int, place: Place) -> None:
        self.places[step] = place
        self._order.append(step)
        if len(self._order) > _REMEMBERED_STEPS:
            self.places.pop(self._order.popleft(), None)


class NumberWatch:
    """Watches the numbers of one session. ``count_skipped()`` counts a step that was left out and returns how many."""

    def __init__(
        self,
        policies: NumberPolicies,
        representations: list[Representation],
        *,
        emit: Callable[[Event], None],
        count_skipped: Callable[[], int],
    ) -> None:
        self.policies = policies
        self.history: SkippedSteps = NONE_SKIPPED
        self.detector = None if policies.spikes is None else SpikeDetector(policies.spikes)
        self.values = None if policies.spikes is None else LateValues()
        """Given the losses and norms of each step, where somebody looks for spikes."""
        self.trail: Trail | None = Trail() if policies.may_go_back else None
        self.trouble: Trouble | None = None
        """What the last look has found to end the run, or to make it go back."""
        self._representations = representations
        self._emit = emit
        self._count_skipped = count_skipped
        self._skipped = 0

    def remember_places(self) -> None:
        """From now on the place in the data after each step is kept, for findings that come later."""
        self.trail = self.trail or Trail()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to decide as an unbroken one."""
        return {} if self.detector is None else self.detector.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.detector is not None:
            self.detector.load_state_dict(state)

    def prepare(self, next_step: int) -> None:
        """Before a step: catches what is to be measured after it."""
        for representation in self._representations:
            representation.prepare(next_step)

    def let_go(self) -> None:
        """Takes all hooks off."""
        for representation in self._representations:
            representation.let_go()

    def look(
        self, steps: StepWatch, step: int, position: DataPosition, phase: int, batches: int, *, wait: bool = False
    ) -> WardenError | None:
        """After ``step``, which took ``batches`` batches: what ends the run, or makes it go back.

        ``wait`` makes sure that nothing is still on its way, which synchronises. `trouble` knows more about the error.
        """
        if self.trail is not None:
            self.trail.note(step, place_of(position, phase))
        for found_step, findings in steps.poll(wait=wait):
            if findings.what is not None or self.history.streak:
                place = place_of(position, phase) if found_step == step else None
                self._judge(found_step, findings, position, place, batches)
        if self.values is not None:
            self._look_for_spikes(self.values, step, wait=wait)
        if self._representations:
            self._measure(step)
            self.prepare(step + 1)
        return self.trouble.error if self.trouble else None

    def check_state(self, watched: Watched, step: int) -> StateNotFiniteError | None:
        """What forbids to write a checkpoint of this rank's weights and optimizer states."""
        found = first_bad_state(watched.models, watched.optimizers)
        return None if found is None else StateNotFiniteError(tensor=found[0], kind=found[1], step=step)

    # -- not finite ----------------------------------------------------------------------------------------------

    def _judge(
        self, step: int, findings: StepFindings, position: DataPosition, place: Place | None, batches: int
    ) -> None:
        policy = self.policies.finite
        before = self.history
        self.history = policy.after(before, step, findings)
        if findings.what is None or before.told(step):
            return
        counted = self.history is not before
        found = self._where(step, findings, position, place, batches) if counted or findings.applied else _Found()
        culprit = findings.culprit
        if not findings.applied:
            self._skipped = self._count_skipped()
            self._emit(
                StepSkipped(
                    step=step,
                    what=findings.what,
                    streak=self.history.streak,
                    tensor=culprit.tensor if culprit else None,
                    kind=culprit.kind if culprit else None,
                    micro_batch=found.micro_batch,
                    epoch=found.epoch,
                    batch_index=found.batch_index,
                    samples=found.samples,
                )
            )
        verdict = policy.verdict(self.history, step, findings)
        if verdict is not None and self.trouble is None:
            self.trouble = self._trouble(verdict, step, findings, found)

    def _where(
        self, step: int, findings: StepFindings, position: DataPosition, place: Place | None, batches: int
    ) -> _Found:
        """The batch that the culprit came from, and its samples."""
        micro_batch = findings.culprit.micro_batch if findings.culprit else None
        if place is None:
            places = self.trail.places if self.trail is not None else {}
            place, previous = places.get(step), places.get(step - 1)
            if place is None or previous is None or place.epoch != previous.epoch:
                return _Found(micro_batch)
            batches = place.batch_index - previous.batch_index
        passes = findings.culprit.micro_batches if findings.culprit else 0
        if batches > 1 and (micro_batch is None or passes != batches):
            return _Found(micro_batch, place.epoch)  # any of these batches
        index = place.batch_index - batches + (micro_batch if batches > 1 and micro_batch is not None else 0)
        if index < 0:  # the step has batches of two epochs
            return _Found(micro_batch)
        samples = None
        if place.epoch == position.epoch:
            streams = position.streams_at_opening
            samples = samples_of(position.loader, epoch=place.epoch, streams_at_opening=streams, batch_index=index)
        return _Found(micro_batch, place.epoch, index, samples)

    def _trouble(self, verdict: FiniteVerdict, step: int, findings: StepFindings, found: _Found) -> Trouble:
        culprit, policy = findings.culprit, self.policies.finite
        named = f"{culprit.kind} in {culprit.tensor} at step {step}" if culprit else f"step {step}"
        share = f"{len(self.history.recent)} of the last {policy.share_window_steps} steps; " * (
            verdict.limit == "share"
        )
        applied = "; it has reached the weights" * findings.applied
        error = NaNLossError(
            streak=self.history.streak,
            skipped=self._skipped,
            what=findings.what,
            problem=f"{share}{named}{applied}",
            limit=verdict.limit,
            step=step,
            tensor=culprit.tensor if culprit else None,
            kind=culprit.kind if culprit else None,
            micro_batch=found.micro_batch,
            epoch=found.epoch,
            batch_index=found.batch_index,
            samples=None if found.samples is None else list(found.samples),
        )
        first = verdict.first_step if verdict.action == "rollback" else None
        return Trouble(error, findings.applied, first, step, error.message)

    # -- spikes --------------------------------------------------------------------------------------------------

    def _look_for_spikes(self, values: LateValues, step: int, *, wait: bool) -> None:
        values.close(step)
        assert self.detector is not None
        for late in values.poll(wait=wait):
            if both_finite(late):  # else the step was left out, and its values say nothing
                for spike in self.detector.observe(late.step, late.loss, late.grad_norm):
                    self._tell(spike, self.detector.policy)

    def _tell(self, spike: Spike, policy: SpikePolicy) -> None:
        event = SpikeDetected(
            step=spike.step,
            signal=spike.signal,
            value=spike.value,
            usual=spike.usual,
            deviations=spike.deviations,
        )
        self._emit(event)
        if policy.action == "announce" or self.trouble is not None:
            return
        first = spike.first_step if policy.action == "rollback" else None
        self.trouble = Trouble(_spike_error(spike), True, first, spike.step, str(event))

    # -- collapse ------------------------------------------------------------------------------------------------

    def _measure(self, step: int) -> None:
        for representation in self._representations:
            collapse = representation.measure(step)
            if collapse is None:
                continue
            name = representation.name
            if representation.policy.action == "announce":
                told = CollapseDetected(
                    step=step,
                    representation=name,
                    criterion=collapse.criterion,
                    value=collapse.value,
                    threshold=collapse.threshold,
                )
                self._emit(told)
            elif self.trouble is None:
                self.trouble = Trouble(_collapse_error(name, collapse, step), spoiled=True)


def place_of(position: DataPosition, phase: int) -> Place:
    """Where the loader number ``phase`` of a run stands."""
    return Place(phase, position.epoch, position.batch_index)


def _spike_error(spike: Spike) -> LossSpikeError:
    return LossSpikeError(
        signal=spike.signal,
        step=spike.step,
        first_step=spike.first_step,
        value=float(f"{spike.value:.4g}"),
        usual=float(f"{spike.usual:.4g}"),
        deviations=float(f"{spike.deviations:.1f}"),
        problem=None,
    )


def _collapse_error(name: str, collapse: Collapse, step: int) -> CollapseDetectedError:
    return CollapseDetectedError(
        representation=name,
        criterion=collapse.criterion,
        value=float(f"{collapse.value:.4g}"),
        threshold=float(f"{collapse.threshold:.4g}"),
        measurements=collapse.measurements,
        step=step,
    )
