"""The other methods: the closed form, and the arithmetic of ``accelerate estimate-memory``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from memory_cases.cases import PLAIN, Case
from trainwarden.memory import arithmetic
from trainwarden.memory.architecture import UnknownArchitectureError, architecture_of
from trainwarden.memory.plan import TrainingPlan


def closed_form(config: dict[str, Any], plan: TrainingPlan) -> int | None:
    """The closed form's peak in bytes; ``None`` for models that it does not know."""
    try:
        return arithmetic.predict(architecture_of(config), plan).peak_bytes
    except UnknownArchitectureError:
        return None


def plan_of(case: Case) -> TrainingPlan | None:
    """The case as the closed form takes it; ``None`` where it has no word for it."""
    # A loop over parameters is nearest to the fused variant: its temporaries are those of one parameter.
    names = {
        "adamw": "adamw_fused",
        "adamw_foreach": "adamw_foreach",
        "adamw_fused": "adamw_fused",
        "adamw_8bit": "adamw_8bit",
    }
    if case.optimizer not in names or case.family in (*PLAIN, "bert", "t5"):
        return None
    return TrainingPlan(
        mode=case.mode,  # type: ignore[arg-type]
        micro_batch_size=case.rows,
        sequence_length=case.tokens,
        grad_accum_steps=case.grad_accum_steps,
        optimizer=names[case.optimizer],  # type: ignore[arg-type]
        weights="bfloat16" if case.dtype == "bf16" else "float32",
        autocast="bfloat16" if case.autocast and case.dtype == "fp32" else None,
        checkpointing=case.checkpointing,
        optimizer_in_backward=case.optimizer_in_backward,
        lora_rank=8,
        loss_chunk_tokens=case.loss_chunk_tokens,
    )


def accelerate_estimate(model: nn.Module, dtype: torch.dtype) -> int:
    """What ``accelerate estimate-memory`` prints as training memory: from the model's size and nothing else."""
    from accelerate.commands.estimate import estimate_training_usage

    fp32_bytes = 4 * sum(p.numel() for p in model.parameters())
    name = "float32" if dtype is torch.float32 else "bfloat16"
    return int(max(estimate_training_usage(fp32_bytes, name).values()))
