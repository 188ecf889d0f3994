"""`preflight`: whether a training fits, by how much and why, before anything is loaded, downloaded or started."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from trainwarden.errors import (
    Finding,
    Findings,
    PreflightHostMemoryError,
    PreflightMemoryError,
    Severity,
    UnpredictableModelError,
)
from trainwarden.memory.cards import CARDS
from trainwarden.memory.largest import Largest, largest
from trainwarden.memory.overheads import DeviceMemory, Overheads
from trainwarden.memory.plan import TrainingPlan
from trainwarden.memory.prediction import Prediction
from trainwarden.memory.remedies import UNPREDICTABLE_BYTES, Advice, advise
from trainwarden.train.forecast import Forecast, NoPredictionError
from trainwarden.train.subject import Subject, positions_of

MOST_ROWS = 4096
"""Micro-batches that are looked at: beyond, a larger one makes nothing faster."""
SEQUENCE_STEP = 64
"""Sequence lengths are looked at in steps of this many tokens, as attention kernels pad to it anyway."""
_CONFIRMATIONS = 3


@dataclass(frozen=True)
class PreflightReport:
    """Everything that `preflight` found out.

    Attributes:
        device: None when no device was named and none is there: then nothing is judged.
        needed_bytes: the predicted peak with its overheads.
        rows, tokens: the largest micro-batch at the planned sequence length, and the longest sequence at the planned
            micro-batch (in steps of `SEQUENCE_STEP`); None without a device.
        advice: what would make it fit, where it does not.
    """

    subject: Subject
    prediction: Prediction
    overheads: Overheads
    device: DeviceMemory | None
    needed_bytes: int
    rows: Largest | None = None
    tokens: Largest | None = None
    advice: Advice | None = None
    findings: Findings = field(default_factory=Findings)

    @property
    def fits(self) -> bool | None:
        """None without a device."""
        return None if self.device is None else self.needed_bytes <= self.device.available_bytes

    @property
    def margin_bytes(self) -> int | None:
        """What is left; negative when it does not fit."""
        return None if self.device is None else self.device.available_bytes - self.needed_bytes

    def require(self) -> None:
        """Raises PreflightRefusedError (exit 78) when a finding refuses the run."""
        self.findings.require(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "model": self.subject.name,
            "parameters": self.subject.architecture.parameters if self.subject.architecture else None,
            "plan": asdict(self.subject.plan),
            "fits": self.fits,
            "needed_bytes": self.needed_bytes,
            "margin_bytes": self.margin_bytes,
            "device": None if self.device is None else asdict(self.device),
            "overheads": {**asdict(self.overheads), "source": self.overheads.source},
            "prediction": _prediction_dict(self.prediction),
            "largest_micro_batch": None if self.rows is None else asdict(self.rows),
            "longest_sequence": None if self.tokens is None else asdict(self.tokens),
            "advice": None if self.advice is None else _advice_dict(self.advice),
            "findings": self.findings.to_dicts(),
        }


def preflight(
    subject: Subject,
    *,
    device: DeviceMemory | None,
    overheads: Overheads,
    host_bytes: int | None = None,
    waive: Iterable[str] = (),
    traced: bool = True,
    largest_too: bool = True,
) -> PreflightReport:
    """Predicts, judges, and looks for what fits.

    Args:
        host_bytes: available host memory; None leaves it unchecked.
        waive: codes of findings that refuse nothing.
        traced: False answers by the closed form alone.

    Raises:
        UnknownCodeError: a waiver names no code.
        UnpredictableModelError: neither trace nor closed form can follow the model.
    """
    waived = list(waive)
    Findings().waive(waived)  # a typing error is said before any work is done
    forecast = Forecast(subject, traced=traced, device_type="cpu" if subject.on_cpu else "cuda")
    try:
        prediction = forecast.predict(subject.plan)
    except NoPredictionError as error:
        raise UnpredictableModelError(model=subject.name, problem=error.reason) from error
    report = PreflightReport(subject, prediction, overheads, device, overheads.needed_bytes(prediction.peak_bytes))
    if device is None:
        return report
    judge = Judge(forecast, overheads, device, host_bytes)
    if largest_too:
        report = replace(report, rows=judge.rows(subject.plan), tokens=judge.tokens(subject.plan))
    if not report.fits:
        report = replace(report, advice=judge.advice(subject.plan))
    found = Findings.of(_findings(report, host_bytes)).waive(waived)
    return replace(report, findings=found)


@dataclass
class Judge:
    """Answers about one model on one device: searches by estimates, and confirms by predictions what it answers."""

    forecast: Forecast
    overheads: Overheads
    device: DeviceMemory
    host_bytes: int | None = None

    @property
    def budget_bytes(self) -> int:
        """Of a predicted peak."""
        return self.overheads.peak_budget_bytes(self.device.available_bytes)

    def rows(self, plan: TrainingPlan) -> Largest:
        """The largest micro-batch at the plan's sequence length: by the best predictions there are."""

        def predicted(rows: int) -> int:
            return self.forecast.predict(replace(plan, micro_batch_size=rows)).peak_bytes

        guess = self._estimated(lambda rows: replace(plan, micro_batch_size=rows), MOST_ROWS, 1).value
        known = {plan.micro_batch_size: predicted(plan.micro_batch_size)}
        return largest(predicted, self.budget_bytes, most=MOST_ROWS, guess=guess, known=known)

    def tokens(self, plan: TrainingPlan) -> Largest:
        """About the longest sequence at the plan's micro-batch, in steps: by estimates, as each trace takes seconds."""
        most = max(SEQUENCE_STEP, positions_of(self.forecast.subject.config))
        return self._estimated(lambda tokens: replace(plan, sequence_length=tokens), most, SEQUENCE_STEP)

    def _estimated(self, having: Callable[[int], TrainingPlan], most: int, step: int) -> Largest:
        return largest(
            lambda value: self.forecast.estimate(having(value)).peak_bytes, self.budget_bytes, most=most, step=step
        )

    def fits(self, plan: TrainingPlan) -> bool:
        return self._need(self.forecast.predict(plan))[0] <= self.device.available_bytes

    def advice(self, plan: TrainingPlan) -> Advice:
        """The cheapest changes that fit: found by estimates, confirmed by a prediction that corrects them."""
        found = self._advise(plan)
        for _ in range(_CONFIRMATIONS):
            if found.plan is None or self.fits(found.plan):
                break
            found = self._advise(plan)  # the prediction that contradicted it is known to the forecast now
        if found.plan is None:
            return found
        return replace(found, needed_bytes=self._need(self.forecast.predict(found.plan))[0])

    def _advise(self, plan: TrainingPlan) -> Advice:
        return advise(
            plan,
            self._estimated_need,
            device_bytes=self.device.available_bytes,
            host_bytes=self.host_bytes,
        )

    def _estimated_need(self, plan: TrainingPlan) -> tuple[int, int]:
        """More than there is for a change that nothing can predict: it is not advised."""
        try:
            return self._need(self.forecast.estimate(plan))
        except NoPredictionError:
            return UNPREDICTABLE_BYTES, 0

    def _need(self, prediction: Prediction) -> tuple[int, int]:
        return self.overheads.needed_bytes(prediction.peak_bytes), prediction.host_bytes


def fitting_cards(needed_bytes: int) -> list[str]:
    """The common cards on which so much fits, smallest first."""
    fitting = [card for card in CARDS if card.memory_bytes >= needed_bytes]
    return [card.name for card in sorted(fitting, key=lambda card: card.memory_bytes)]


# -- rules ------------------------------------------------------------------------------------------------------------


def _findings(report: PreflightReport, host_bytes: int | None) -> list[Finding]:
    found = [_device_finding(report), _host_finding(report, host_bytes)]
    return [finding for finding in found if finding is not None]


def _device_finding(report: PreflightReport) -> Finding | None:
    """An error when the prediction does not fit, a warning when it fits by less than its error."""
    assert report.device is not None
    available = report.device.available_bytes
    uncertain = report.overheads.needed_bytes(round(report.prediction.peak_bytes * (1 + report.prediction.error)))
    if uncertain <= available:
        return None
    condition = memory_error(report)
    severity = Severity.ERROR if report.needed_bytes > available else Severity.WARNING
    return Finding(condition, severity, report.device.name)


def memory_error(report: PreflightReport) -> PreflightMemoryError:
    """The condition that a run does not fit on its device, or hardly, with what would help."""
    assert report.device is not None
    remedy = advice_sentence(report.advice)
    condition = PreflightMemoryError(
        needed_bytes=report.needed_bytes,
        available_bytes=report.device.available_bytes,
        peak_bytes=report.prediction.peak_bytes,
        phase=report.prediction.phase,
        remedy=remedy,
    )
    if report.fits:
        condition.suggestion = "It fits by less than the error of the prediction: keep oom_recovery on."
    elif report.advice is not None and report.advice.plan is None:
        condition.suggestion = "Use a larger device or a smaller model."
    return condition


def advice_sentence(advice: Advice | None) -> str | None:
    """What fits, in one clause; None where nothing was looked for."""
    if advice is None:
        return None
    if advice.plan is None or advice.needed_bytes is None:
        return "none of the usual changes makes it fit"
    plan = advice.plan
    names = _listed([f"{change.name} ({change.flags(plan)})" for change in advice.changes])
    return f"{names} would bring it to {advice.needed_bytes / 2**30:.2f} GiB"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _host_finding(report: PreflightReport, host_bytes: int | None) -> Finding | None:
    needed = report.prediction.host_bytes
    if host_bytes is None or needed <= host_bytes:
        return None
    condition = PreflightHostMemoryError(needed_bytes=needed, available_bytes=host_bytes)
    return Finding(condition, Severity.ERROR, "host memory")


def _prediction_dict(prediction: Prediction) -> dict[str, Any]:
    return {**asdict(prediction), "notes": list(prediction.notes)}


def _advice_dict(advice: Advice) -> dict[str, Any]:
    return {
        "changes": [
            {"name": c.name, "cost": c.cost, "how": c.flags(advice.plan) if advice.plan else c.how}
            for c in advice.changes
        ],
        "plan": None if advice.plan is None else asdict(advice.plan),
        "needed_bytes": advice.needed_bytes,
        "tried": [
            {"name": step.remedy.name, "alone_bytes": step.alone_bytes, "together_bytes": step.together_bytes}
            for step in advice.steps
        ],
    }
