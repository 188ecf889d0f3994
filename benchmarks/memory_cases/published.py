"""GPU peaks that others published, beside the predictions of the same trainings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from memory_cases.cases import prepare
from memory_cases.estimates import accelerate_estimate, closed_form
from trainwarden.memory.plan import TrainingPlan
from trainwarden.memory.prediction import Prediction
from trainwarden.memory.trace import TrainingLoop, default_loss, trace
from trainwarden.memory.trace_optimizers import AdamW8bit
from trainwarden.train.chunked_loss import chunked_loss
from trainwarden.train.quantized import adamw_8bit

GIB = 2**30
CHUNK = 1024
"""torchtune divides the tokens of a micro-batch, here 8,192, by eight."""

SHAPES: dict[str, dict[str, Any]] = {
    "Llama-2-7B": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    "Llama-3.1-8B": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "Llama-3.2-3B": {"model_type": "llama", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28}
    | {"num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "Qwen2.5-0.5B": {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    | {"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "Qwen2.5-1.5B": {"model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
    | {"num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "Qwen2.5-7B": {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    | {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
    "Qwen2.5-14B": {"model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48}
    | {"num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064},
    "Qwen2.5-32B": {"model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64}
    | {"num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064},
}
FULL = TrainingPlan(mode="full", optimizer="adamw_fused", checkpointing=True)
LORA = TrainingPlan(mode="lora", lora_rank=8, checkpointing=True)
QLORA = TrainingPlan(mode="qlora", lora_rank=8, checkpointing=True)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A peak that others measured on a GPU, and what is known to differ from what is predicted."""

    source: str
    model: str
    what: str
    plan: TrainingPlan
    published: float
    """In the unit that the source calls GB or GiB; taken for GiB."""
    differs: str


_TORCHTUNE = "torchtune README"
_LADDER = replace(FULL, checkpointing=False, micro_batch_size=2, sequence_length=4096)
PUBLISHED = (
    Published(
        source=_TORCHTUNE,
        model="Llama-3.1-8B",
        what="full, RTX 4090",
        plan=replace(FULL, optimizer="paged_adamw_8bit", optimizer_in_backward=True),
        published=18.9,
        differs="its own model code; batch and sequence unstated",
    ),
    Published(
        source=_TORCHTUNE,
        model="Llama-3.1-8B",
        what="full, A6000",
        plan=replace(FULL, optimizer="adamw_8bit"),
        published=37.4,
        differs="optimizer, batch and sequence unstated",
    ),
    *(
        Published(
            source=_TORCHTUNE,
            model="Llama-3.1-8B",
            what=f"{plan.mode}, {card}",
            plan=plan,
            published=figure,
            differs="batch and sequence unstated",
        )
        for plan, card, figure in ((LORA, "RTX 4090", 16.2), (LORA, "A6000", 30.3), (QLORA, "RTX 4090", 7.4))
    ),
    *(
        Published(
            source=_TORCHTUNE,
            model="Llama-3.2-3B",
            what=f"full, A100, {what}",
            plan=plan,
            published=gib,
            differs=differs,
        )
        for what, plan, gib, differs in (
            ("baseline", replace(_LADDER, sequence_length=1024), 25.5, "rows of unstated length, not packed"),
            ("packed", _LADDER, 60.0, "its own model code"),
            ("+ compile", _LADDER, 51.0, "compiled; predicted without"),
            ("+ chunked loss", replace(_LADDER, loss_chunk_tokens=CHUNK), 42.9, "compiled; predicted without"),
            (
                "+ checkpointing",
                replace(_LADDER, loss_chunk_tokens=CHUNK, checkpointing=True),
                24.9,
                "compiled; predicted without",
            ),
            (
                "+ optimizer in backward",
                replace(_LADDER, loss_chunk_tokens=CHUNK, checkpointing=True, optimizer_in_backward=True),
                23.1,
                "compiled; predicted without",
            ),
            (
                "+ activations on host",
                replace(_LADDER, loss_chunk_tokens=CHUNK, checkpointing=True, optimizer_in_backward=True),
                21.8,
                "predicted without moving activations to the host",
            ),
            (
                "+ 8-bit states",
                replace(
                    _LADDER,
                    loss_chunk_tokens=CHUNK,
                    checkpointing=True,
                    optimizer_in_backward=True,
                    optimizer="adamw_8bit",
                ),
                17.6,
                "predicted without moving activations to the host",
            ),
        )
    ),
    *(
        Published(
            source=_TORCHTUNE,
            model="Llama-3.2-3B",
            what=f"{plan.mode}, A100",
            plan=replace(plan, micro_batch_size=2, sequence_length=4096, loss_chunk_tokens=CHUNK),
            published=gib,
            differs="compiled, activations on the host; predicted without",
        )
        for plan, gib in ((LORA, 8.5), (QLORA, 4.6))
    ),
    *(
        Published(
            source="LLaMA-Factory wiki",
            model="Llama-2-7B",
            what=f"QLoRA, A100, {tokens} tokens",
            plan=replace(QLORA, sequence_length=tokens),
            published=gib,
            differs="transformers of early 2024; figures are of the whole device",
        )
        for tokens, gib in ((1024, 6), (2048, 7), (4096, 9), (8192, 12), (16384, 19), (32768, 32))
    ),
    *(
        Published(
            source="Unsloth table",
            model=model,
            what="QLoRA, least",
            plan=replace(QLORA, sequence_length=512),
            published=gib,
            differs="its own kernels; sequence unstated",
        )
        for model, gib in (("Qwen2.5-14B", 8.5), ("Qwen2.5-32B", 26.0))
    ),
)


def plan_model(shape: dict[str, Any], plan: TrainingPlan) -> nn.Module:
    """The model that a plan trains, without weights of any meaning."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(shape)
    config = AutoConfig.for_model(values.pop("model_type"), use_cache=False, **values)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, plan.weights))
    return prepare(model, plan.mode, checkpointing=plan.checkpointing, rank=plan.lora_rank)


def plan_loop(plan: TrainingPlan, *, real: bool = False) -> TrainingLoop:
    """The step of a plan. ``real``: with the 8-bit optimizer of bitsandbytes, not its stand-in."""

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if real and plan.optimizer == "adamw_8bit":
            return adamw_8bit([{"params": parameters}], learning_rate=1e-3)
        if "8bit" in plan.optimizer:
            return AdamW8bit(parameters, paged=plan.optimizer.startswith("paged"))
        return torch.optim.AdamW(parameters, fused=plan.optimizer == "adamw_fused")

    chunk = plan.loss_chunk_tokens
    return TrainingLoop(
        compute_loss=default_loss if chunk is None else partial(chunked_loss, chunk_tokens=chunk),
        make_optimizer=optimizer,
        optimizer_in_backward=plan.optimizer_in_backward,
    )


def plan_batch(plan: TrainingPlan, device: str = "meta") -> dict[str, torch.Tensor]:
    """One micro-batch without padding."""
    ids = torch.zeros(plan.micro_batch_size, plan.sequence_length, dtype=torch.int64, device=device)
    return {"input_ids": ids, "labels": ids.clone()}


def plan_trace(model: str, plan: TrainingPlan) -> Prediction:
    """The prediction for CUDA's allocator."""
    return trace(lambda: plan_model(SHAPES[model], plan), plan_batch(plan), plan_loop(plan), device_type="cuda")


def published_rows() -> list[dict[str, Any]]:
    """Every published figure beside the predictions, in GiB."""
    rows = []
    for entry in PUBLISHED:
        with torch.device("meta"):
            whole = plan_model(SHAPES[entry.model], replace(entry.plan, mode="full"))
        closed = closed_form(SHAPES[entry.model], entry.plan)
        peak = plan_trace(entry.model, entry.plan).peak_bytes
        rows.append(
            {
                "source": entry.source,
                "what": f"{entry.model}, {entry.what}",
                "published_gib": entry.published,
                "traced_gib": round(peak / GIB, 2),
                "closed_form_gib": None if closed is None else round(closed / GIB, 2),
                "accelerate_gib": round(accelerate_estimate(whole, torch.bfloat16) / GIB, 2),
                "differs": entry.differs,
            }
        )
    return rows
