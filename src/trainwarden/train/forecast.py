"""Predictions of the memory of a fine-tuning: the trace of what `Trainer` would run, or the closed form, and why."""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainwarden.memory import arithmetic
from trainwarden.memory.plan import TrainingPlan
from trainwarden.memory.prediction import Prediction
from trainwarden.memory.trace import CannotTraceError, TrainingLoop, trace
from trainwarden.memory.trace_loop import ComputeLoss
from trainwarden.train.chunked_loss import chunked_loss
from trainwarden.train.models import quiet_torchao, without_collections
from trainwarden.train.subject import Subject

ATTENTION = "warden_trace"
DeviceType = Literal["cuda", "cpu"]


class NoPredictionError(Exception):
    """Neither trace nor closed form can say anything; ``reason`` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass
class Forecast:
    """Predicts one model under many plans. Each plan is computed once.

    Args:
        subject: the model.
        traced: whether tracing is tried at all.
        device_type: whose allocator is asked about.
    """

    subject: Subject
    traced: bool = True
    device_type: DeviceType = "cuda"
    _known: dict[TrainingPlan, Prediction] = field(default_factory=dict, init=False)
    _why_not_traced: str = field(default="", init=False)
    _built: dict[TrainingPlan, nn.Module] = field(default_factory=dict, init=False, repr=False)
    _scale: dict[Any, float] = field(default_factory=dict, init=False)
    """Trace over closed form, by what makes them differ: see `_kind`."""

    def predict(self, plan: TrainingPlan) -> Prediction:
        """The best prediction there is: traced, else by the closed form with a note that says why.

        Raises NoPredictionError when neither is possible.
        """
        if plan not in self._known:
            self._known[plan] = self._predict(plan)
        return self._known[plan]

    def estimate(self, plan: TrainingPlan) -> Prediction:
        """A quick prediction for searching: the closed form, scaled to what was traced of this model."""
        if plan in self._known:
            return self._known[plan]
        if self.subject.architecture is None:
            return self.predict(plan)
        closed = arithmetic.predict(self.subject.architecture, plan)
        return _scaled(closed, self._scale.get(_kind(plan), 1.0))

    def _predict(self, plan: TrainingPlan) -> Prediction:
        architecture = self.subject.architecture
        reason = self._why_not()
        if not reason:
            try:
                prediction = self._trace(plan)
            except CannotTraceError as error:
                reason = self._why_not_traced = error.reason
            else:
                return self._checked(prediction, plan)
        if architecture is None:
            raise NoPredictionError(f"{reason.rstrip('.')}; and {self.subject.no_architecture}")
        closed = arithmetic.predict(architecture, plan)
        return replace(closed, notes=(f"not traced: {reason}", *closed.notes))

    def _why_not(self) -> str:
        if not self.traced:
            return "the closed form was asked for"
        return self._why_not_traced

    def _trace(self, plan: TrainingPlan) -> Prediction:
        with quiet_torchao(), _quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries, about a model that will never run
            return trace(
                lambda: self._model(plan),
                example_batch(plan),
                loop_for(plan),
                device_type=self.device_type,
                cpu_offload=plan.offload,
            )

    def _model(self, plan: TrainingPlan) -> nn.Module:
        """What is traced of ``plan``; the last one is kept, since searches change the batch only."""
        key = replace(plan, micro_batch_size=1, sequence_length=1, grad_accum_steps=1, optimizer="sgd")
        if key not in self._built:
            with without_collections():
                self._built = {key: builder(self.subject.config, plan)()}
        return self._built[key]

    def _checked(self, prediction: Prediction, plan: TrainingPlan) -> Prediction:
        architecture = self.subject.architecture
        if architecture is None:
            return prediction
        self._scale[_kind(plan)] = prediction.peak_bytes / arithmetic.predict(architecture, plan).peak_bytes
        differs = arithmetic.disagreement(prediction, architecture, plan)
        return replace(prediction, notes=(*prediction.notes, differs)) if differs else prediction


def _kind(plan: TrainingPlan) -> Any:
    return plan.mode, plan.checkpointing, plan.autocast, plan.optimizer, plan.loss_chunk_tokens


def _scaled(prediction: Prediction, factor: float) -> Prediction:
    breakdown = {kind: round(size * factor) for kind, size in prediction.breakdown.items()}
    phases = {phase: round(size * factor) for phase, size in prediction.phases.items()}
    phases[prediction.phase] = peak = sum(breakdown.values())
    phases = {phase: min(size, peak) for phase, size in phases.items()}
    return replace(prediction, breakdown=breakdown, phases=phases, peak_bytes=peak)


# -- what is traced ---------------------------------------------------------------------------------------------------


def builder(config: Mapping[str, Any], plan: TrainingPlan) -> Callable[[], nn.Module]:
    """A callable that builds the model as `Trainer` would, for a trace on the meta device."""

    def build() -> nn.Module:
        with quiet_torchao():
            from transformers import AutoConfig, AutoModelForCausalLM

        _register_attention()
        values = {key: value for key, value in config.items() if key not in _NOT_SETTINGS}
        settings = AutoConfig.for_model(config["model_type"], **values)
        settings._attn_implementation = ATTENTION
        model = AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, plan.weights))
        return _prepared(model, plan)

    return build


_NOT_SETTINGS = frozenset(
    {"model_type", "transformers_version", "auto_map", "_name_or_path", "torch_dtype", "dtype", "quantization_config"}
)
"""Of a ``config.json``: about the file, not the model, or set by the plan."""


def _prepared(model: Any, plan: TrainingPlan) -> nn.Module:
    if plan.mode == "qlora":
        from trainwarden.memory.trace_packed import pack_linears

        compute = getattr(torch, plan.autocast or plan.weights)
        head = model.get_output_embeddings()
        kept = {name.rpartition(".")[2] for name, module in model.named_modules() if module is head}
        pack_linears(model, compute_dtype=compute, double_quant=True, skip=kept)
    if plan.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if plan.mode != "full":
        model = _with_adapters(model, plan)
    trained: nn.Module = model.train()
    return trained


def _with_adapters(model: Any, plan: TrainingPlan) -> Any:
    with _without_bitsandbytes():
        return _adapted(model, plan)


@contextmanager
def _without_bitsandbytes() -> Iterator[None]:
    """Keeps peft from importing bitsandbytes, a second's work, for a model that has none of its layers."""
    if "bitsandbytes" in sys.modules:
        yield
        return
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["bitsandbytes"]
        tests = importlib.import_module("peft.import_utils")
        for name in ("is_bnb_available", "is_bnb_4bit_available"):  # they remember what they found
            getattr(getattr(tests, name, None), "cache_clear", lambda: None)()


def _adapted(model: Any, plan: TrainingPlan) -> Any:
    with quiet_torchao():
        from peft import LoraConfig, TaskType, get_peft_model

    settings = LoraConfig(
        r=plan.lora_rank,
        lora_alpha=2 * plan.lora_rank,
        lora_dropout=plan.lora_dropout,
        target_modules="all-linear",
        task_type=TaskType.CAUSAL_LM,
        init_lora_weights=False,
    )
    return get_peft_model(model, settings)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keeps advice about a model that is never run out of the answer."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _register_attention() -> None:
    """Flash-like attention without the mask and the copies that transformers makes under fake tensors only."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from trainwarden.memory.trace_attention import causal_attention

    AttentionInterface.register(ATTENTION, causal_attention)
    AttentionMaskInterface.register(ATTENTION, lambda *_arguments, **_named: None)


def example_batch(plan: TrainingPlan) -> dict[str, Tensor]:
    """One micro-batch as the loader makes it: int64 of shape (rows, tokens), on the meta device."""
    shape = (plan.micro_batch_size, plan.sequence_length)
    return {name: torch.zeros(shape, dtype=torch.int64, device="meta") for name in _BATCH}


_BATCH = ("input_ids", "attention_mask", "labels")


def loop_for(plan: TrainingPlan) -> TrainingLoop:
    """The step of `TrainingLoop` in `train.loop`, for a trace."""
    return TrainingLoop(
        compute_loss=_loss_of(plan),
        make_optimizer=lambda parameters: _optimizer(parameters, plan),
        grad_accum_steps=plan.grad_accum_steps,
        autocast=None if plan.autocast is None else getattr(torch, plan.autocast),
        max_grad_norm=None if plan.optimizer_in_backward else 1.0,
        optimizer_in_backward=plan.optimizer_in_backward,
    )


def _loss_of(plan: TrainingPlan) -> ComputeLoss:
    if plan.loss_chunk_tokens is not None:
        return partial(chunked_loss, chunk_tokens=plan.loss_chunk_tokens)
    return _converted_loss if plan.autocast else _plain_loss


def _plain_loss(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = model(**batch, use_cache=False).loss
    return loss


def _converted_loss(model: nn.Module, batch: Any) -> Tensor:
    """accelerate converts everything that a model under autocast returns to float32, the logits too."""
    from accelerate.utils import convert_to_fp32

    loss: Tensor = convert_to_fp32(model(**batch, use_cache=False)).loss
    return loss


def _optimizer(parameters: list[nn.Parameter], plan: TrainingPlan) -> torch.optim.Optimizer:
    if plan.optimizer in ("adamw_8bit", "paged_adamw_8bit"):
        from trainwarden.memory.trace_optimizers import AdamW8bit

        return AdamW8bit(parameters, paged=plan.optimizer == "paged_adamw_8bit")
    if plan.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=1e-3)
    fused = plan.optimizer == "adamw_fused"
    return torch.optim.AdamW(parameters, lr=1e-3, fused=fused, foreach=not fused)
