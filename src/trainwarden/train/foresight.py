"""What a `Trainer` foresees of memory: before its weights are loaded, after, and what really happened in the end.

On a GPU, or with ``device_memory_bytes``, the run is predicted; on a bare CPU nothing is. A prediction that fails never
stops a run: it is a notice. CUDA is not started and nothing is downloaded for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainwarden import device as hardware
from trainwarden.device import known
from trainwarden.errors import (
    FullFinetuneModelTooLargeError,
    LedgerError,
    PreflightMemoryError,
    WardenError,
    lookup,
)
from trainwarden.memory.ceilings import ceiling_billions
from trainwarden.memory.overheads import NO_OVERHEADS, DeviceMemory, Overheads, RunMemory, calibrated
from trainwarden.memory.plan import TrainingPlan
from trainwarden.memory.prediction import Prediction
from trainwarden.runs import Ledger
from trainwarden.train.forecast import Forecast, NoPredictionError
from trainwarden.train.models import Say, source_name
from trainwarden.train.precision import Precision
from trainwarden.train.preflight import Judge, advice_sentence
from trainwarden.train.subject import OPTIMIZERS, Subject, complete, plan_for, read_subject, subject_of

if TYPE_CHECKING:
    from trainwarden.runtime import Guard
    from trainwarden.train.preparation import Prepared
    from trainwarden.train.result import TrainResult
    from trainwarden.train.trainer import Trainer

AUTO_MARGIN = 0.05
"""What ``batch_size="auto"`` leaves free of the device's memory, besides the overheads."""
AUTO_WITHOUT_DEVICE = 8
AUTO_FILE = "auto_batch_size.json"
"""Keeps what ``auto`` has chosen: a continued run takes the same steps, whatever else is on the device by then."""
_MOST_AUTO_ROWS = 1024


class Foresight:
    """The predictions of one training, and what follows from them."""

    def __init__(self, trainer: Trainer, device: torch.device, precision: Precision, *, say: Say) -> None:
        self._trainer = trainer
        self._say = say
        self._on_gpu = tells_peaks(device)
        self._memory = _memory_of(device, trainer.device_memory_bytes)
        self._overheads = self._known_overheads() if self._on_gpu else NO_OVERHEADS
        self._forecast: Forecast | None = None
        self._prediction: Prediction | None = None
        self._plan = plan_of(trainer, precision)

    # -- before and after the weights ----------------------------------------------------------------------------

    def before_load(self, tokenizer: Any) -> None:
        """Predicts from the configuration alone.

        Raises FullFinetuneModelTooLargeError or PreflightMemoryError when not even one row fits.
        """
        subject = self._subject(tokenizer)
        if subject is not None:
            self._consider(subject)

    def after_load(self, model: Any) -> None:
        """Checks again with the count of the loaded model; predicts it if there was nothing to predict from before.

        Raises as `before_load`.
        """
        trainable = [p for p in model.parameters() if p.requires_grad]
        count = sum(p.numel() for p in model.parameters())
        if self._trainer.mode == "full" and self._ceiling_refuses(count):
            raise self._too_large(count, None)
        settings: Any = getattr(model, "config", None)
        if self._memory is None:
            return
        if self._forecast is None and hasattr(settings, "to_dict"):
            self._consider(subject_of(source_name(self._trainer.model), settings.to_dict(), self._plan))
        if self._forecast is None:
            self._require_floor(count, sum(p.numel() * p.element_size() for p in trainable))

    def _subject(self, tokenizer: Any) -> Subject | None:
        """The model by its configuration, or None when it is not known before the model is there."""
        source = self._trainer.model
        if self._memory is None and self._trainer.full_ft_ceiling_billions is None:
            return None
        try:
            if isinstance(source, Mapping):
                config = {"vocab_size": len(tokenizer), **source}
                return subject_of(source_name(source), complete("model.config", config), self._plan)
            if isinstance(source, torch.nn.Module):
                return None
            found = read_subject(str(source))
        except WardenError:
            return None  # loading says what is wrong, or downloads what is not here yet
        return replace(found, plan=self._plan)

    def _consider(self, subject: Subject) -> None:
        count = subject.architecture.parameters if subject.architecture else None
        if self._trainer.mode == "full" and count is not None and self._ceiling_refuses(count):
            raise self._too_large(count, None)
        if self._memory is None:
            return
        forecast = Forecast(subject, device_type="cuda" if self._on_gpu else "cpu")
        one_row = replace(self._plan, micro_batch_size=1)
        try:
            prediction = forecast.predict(one_row)
        except NoPredictionError as error:
            self._say(f"memory is not predicted: {error.reason}")
            return
        self._forecast = forecast
        needed = self._overheads.needed_bytes(round(prediction.peak_bytes * (1 - prediction.error)))
        if needed > self._memory.available_bytes and not self._allowed(count):
            raise self._refusal(count, self._overheads.needed_bytes(prediction.peak_bytes), one_row)

    def _require_floor(self, count: int, trained_bytes: int) -> None:
        """Where nothing predicts the model: its trained weights, their gradients and two moments are a lower bound."""
        assert self._memory is not None
        floor = 4 * trained_bytes
        if self._trainer.mode == "full" and floor > self._memory.available_bytes and not self._allowed(count):
            raise self._too_large(count, floor)

    # -- refusing ------------------------------------------------------------------------------------------------

    def _allowed(self, count: int | None) -> bool:
        """Whether a person has said that it will fit."""
        trainer = self._trainer
        if trainer.mode == "full":
            ceiling = trainer.full_ft_ceiling_billions
            return ceiling is not None and count is not None and count <= ceiling * 1e9
        return any(lookup(code) is PreflightMemoryError for code in trainer.waive)

    def _ceiling_refuses(self, count: int) -> bool:
        ceiling = self._trainer.full_ft_ceiling_billions
        return ceiling is not None and count > ceiling * 1e9

    def _refusal(self, count: int | None, needed_bytes: int, plan: TrainingPlan) -> WardenError:
        assert self._memory is not None
        assert self._forecast is not None
        if self._trainer.mode == "full":
            return self._too_large(count or 0, needed_bytes)
        judge = Judge(self._forecast, self._overheads, self._memory)
        return PreflightMemoryError(
            needed_bytes=needed_bytes,
            available_bytes=self._memory.available_bytes,
            peak_bytes=self._forecast.predict(plan).peak_bytes,
            phase=self._forecast.predict(plan).phase,
            remedy=advice_sentence(judge.advice(plan)),
            suggestion="Take what would make it fit; waive=['PREFLIGHT_MEMORY'] trains all the same.",
        )

    def _too_large(self, count: int, needed_bytes: int | None) -> FullFinetuneModelTooLargeError:
        """Contrastive: what this model would fit with, on this machine."""
        available = self._memory.available_bytes if self._memory else 0
        trained = 4 * count * self._plan.weight_bytes
        asked = self._trainer.full_ft_ceiling_billions
        ceiling = ceiling_billions(self._plan, available, self._overheads) if self._memory else None
        offload_ceiling = hardware.host_memory().available_bytes / (4 * self._plan.weight_bytes) / 1e9
        fitting = [option for option, fits in self._options(count, offload_ceiling) if fits]
        instead = " or ".join(fitting) if fitting else "a smaller model or a larger device"
        return FullFinetuneModelTooLargeError(
            model=source_name(self._trainer.model),
            billions=round(count / 1e9, 2),
            ceiling_billions=asked if asked is not None else ceiling,
            offload_billions=round(offload_ceiling, 1),
            needed_bytes=needed_bytes or trained,
            available_bytes=available,
            fits=fitting,
            suggestion=f"Use {instead}; full_ft_ceiling_billions={max(count / 1e9, 0.01):.2f} trains all the same.",
        )

    def _options(self, count: int, offload_ceiling: float) -> list[tuple[str, bool]]:
        offload = count <= offload_ceiling * 1e9 and not self._plan.offload
        if self._forecast is None or self._memory is None:
            return [("full_ft_offload=True", offload), ("mode='lora'", True)]
        compute = self._plan.autocast or self._plan.weights
        lora = replace(self._plan, mode="lora", weights=compute, offload=False, micro_batch_size=1)
        offloaded = replace(self._plan, offload=True, micro_batch_size=1)
        return [
            ("full_ft_offload=True", offload and self._would_fit(offloaded)),
            ("mode='lora'", self._would_fit(lora)),
            ("mode='lora' with gradient_checkpointing=True", self._would_fit(replace(lora, checkpointing=True))),
            ("mode='qlora' with gradient_checkpointing=True", self._would_fit(_packed(lora))),
        ]

    def _would_fit(self, plan: TrainingPlan) -> bool:
        assert self._forecast is not None
        assert self._memory is not None
        try:
            peak = self._forecast.estimate(plan).peak_bytes
        except NoPredictionError:
            return False
        return self._overheads.needed_bytes(peak) <= self._memory.available_bytes

    # -- the micro-batch -----------------------------------------------------------------------------------------

    def settle(self, guard: Guard, prepared: Prepared) -> int:
        """Rows of a micro-batch: as asked, or what ``auto`` makes of the prediction. Tells the guard what fits."""
        longest = max(len(row.input_ids) for row in prepared.train.rows)
        self._plan = replace(self._plan, sequence_length=max(2, longest))
        asked = self._trainer.batch_size
        rows = asked if isinstance(asked, int) and self._fits(asked) else self._predicted_rows()
        chosen = asked if isinstance(asked, int) else self._automatic(rows, len(prepared.train))
        self._plan = replace(self._plan, micro_batch_size=chosen)
        if rows is not None and 0 < rows < chosen and self._may_foretell():
            self._say(f"{chosen} rows of {longest} tokens are predicted not to fit: {rows} at a time")
            guard.foretell(rows)
        if self._forecast is not None:
            fitting = min(chosen, rows) if rows else chosen
            self._prediction = self._forecast.predict(replace(self._plan, micro_batch_size=fitting))
        return chosen

    def _may_foretell(self) -> bool:
        """Not of a loss of the user's own: it is not what was predicted, and may refuse to be split."""
        from trainwarden.train.trainer import Trainer

        return self._trainer.oom_recovery and type(self._trainer).compute_loss is Trainer.compute_loss

    def _fits(self, rows: int) -> bool:
        """Whether so many rows are predicted to fit: then nobody asks how many more would."""
        if self._forecast is None or self._memory is None:
            return False
        judge = Judge(self._forecast, self._overheads, self._memory)
        return judge.fits(replace(self._plan, micro_batch_size=rows))

    def _predicted_rows(self, margin: float = 0.0) -> int | None:
        """The largest micro-batch that fits; None without a prediction."""
        if self._forecast is None or self._memory is None:
            return None
        kept = replace(self._memory, others_bytes=self._memory.others_bytes + round(margin * self._memory.total_bytes))
        return Judge(self._forecast, self._overheads, kept).rows(self._plan).value

    def _automatic(self, rows: int | None, most: int) -> int:
        file = Path(self._trainer.output_dir) / AUTO_FILE
        chosen = _kept(file)
        if chosen is not None and self._trainer.resume != "never":
            self._say(f"batch_size auto: {chosen}, as this run has chosen before ({file.name})")
            return chosen
        if rows is None:
            chosen, why = AUTO_WITHOUT_DEVICE, "memory is not predicted here"
        else:
            chosen = min(max(1, self._predicted_rows(AUTO_MARGIN) or 1), _MOST_AUTO_ROWS)
            length = self._plan.sequence_length
            why = f"{rows} rows of {length} tokens are predicted to fit, and {AUTO_MARGIN:.0%} of memory stays free"
        if chosen > most:
            chosen, why = most, "there are no more rows"
        self._say(f"batch_size auto: {chosen}; {why}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"batch_size": chosen}) + "\n", encoding="utf-8")
        return chosen

    # -- the end -------------------------------------------------------------------------------------------------

    def record(self, run_id: str | None, result: TrainResult | None) -> None:
        """Keeps the predicted and the real peak in the ledger: what later predictions are calibrated by.

        ``result`` is None for a run that ended early. Of it, and of one that ran smaller parts than predicted or went
        back to a checkpoint, the real peak is that of something else, and is not kept.
        """
        if self._prediction is None or self._memory is None or run_id is None:
            return
        as_predicted = result is not None and not (result.shrinks or result.rollbacks)
        peaks = measured_peaks(self._memory) if self._on_gpu and as_predicted else Peaks()
        measured = RunMemory(
            device=self._memory.name,
            predicted_bytes=self._prediction.peak_bytes,
            allocated_bytes=peaks.allocated_bytes,
            reserved_bytes=peaks.reserved_bytes,
            context_bytes=peaks.context_bytes,
        )
        try:
            Ledger().note_memory(run_id, measured)
        except LedgerError as error:
            self._say(f"the memory of this run is not recorded: {error.message}")

    def _known_overheads(self) -> Overheads:
        try:
            return calibrated(Ledger().memory_of_runs(), self._memory.name if self._memory else "")
        except LedgerError:
            return Overheads()  # the run says so itself when it opens the ledger


def plan_of(trainer: Trainer, precision: Precision) -> TrainingPlan:
    """What a `Trainer` does to memory. ``batch_size="auto"`` counts as one row until it is settled."""
    return plan_for(
        trainer.mode,
        str(precision.compute).removeprefix("torch."),
        micro_batch_size=trainer.batch_size if isinstance(trainer.batch_size, int) else 1,
        sequence_length=trainer.max_length,
        grad_accum_steps=trainer.grad_accum_steps,
        checkpointing=trainer.gradient_checkpointing,
        optimizer=OPTIMIZERS[trainer.optimizer],
        loss_chunk_tokens=trainer.loss_chunk_tokens,
        offload=trainer.full_ft_offload,
        lora_rank=trainer.lora_rank,
        lora_dropout=trainer.lora_dropout,
    )


def _packed(lora: TrainingPlan) -> TrainingPlan:
    return replace(lora, mode="qlora", checkpointing=True)


def _memory_of(device: torch.device, asked_bytes: int | None) -> DeviceMemory | None:
    """What the run may use: as asked, else what the driver says; None on a CPU and where the driver is silent."""
    if asked_bytes is not None:
        return DeviceMemory(name=str(device), total_bytes=asked_bytes, source="device_memory_bytes")
    if device.type != "cuda":
        return None
    reading = _reading(device.index or 0)
    total = known(reading.memory_total_bytes) if reading else None
    if reading is None or total is None:
        return None
    used = known(reading.memory_used_bytes) or 0
    return DeviceMemory(name=reading.name, total_bytes=total, others_bytes=used, source="by its driver")


def _reading(index: int) -> hardware.Reading | None:
    found = hardware.list_devices().devices
    return next((one.read() for one in found if one.index == index), None)


@dataclass(frozen=True)
class Peaks:
    """What a device's allocator held at most, and what the process holds beside it; None: not told."""

    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    context_bytes: int | None = None


def tells_peaks(device: torch.device) -> bool:
    """Whether the allocator of this device tells its peaks: CUDA's does, the CPU's does not."""
    return device.type == "cuda"


def measured_peaks(memory: DeviceMemory) -> Peaks:
    """Of this process's training on CUDA."""
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return Peaks(allocated, reserved, _context_bytes(memory))


def _context_bytes(memory: DeviceMemory) -> int | None:
    """What this process holds beside the allocator: what is used now, less what others had and the allocator has."""
    reading = _reading(torch.cuda.current_device())
    used = known(reading.memory_used_bytes) if reading else None
    if used is None:
        return None
    rest = used - memory.others_bytes - torch.cuda.memory_reserved()
    return rest if rest > 0 else None


def _kept(file: Path) -> int | None:
    try:
        chosen = json.loads(file.read_text(encoding="utf-8"))["batch_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return chosen if isinstance(chosen, int) and not isinstance(chosen, bool) and chosen >= 1 else None
