"""The grid of {0.5B, 1.5B, 7B} × {full, LoRA, QLoRA} × {512, 4096} tokens, run on a GPU beside its prediction."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memory_cases.cases import prepare
from memory_cases.published import FULL, LORA, QLORA, SHAPES, plan_batch, plan_loop, plan_trace
from trainwarden.memory.plan import TrainingPlan
from trainwarden.memory.trace_loop import run_steps

SCRIPT = Path(__file__).parents[1] / "memory_prediction.py"

GRID = (
    *(
        (model, replace(plan, sequence_length=tokens))
        for model in ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B")
        for plan in (FULL, LORA, QLORA)
        for tokens in (512, 4096)
    ),
    *(("Qwen2.5-1.5B", replace(plan, sequence_length=4096, loss_chunk_tokens=1024)) for plan in (FULL, LORA, QLORA)),
    ("Qwen2.5-1.5B", replace(FULL, sequence_length=4096, optimizer="adamw_8bit")),
)
"""The grid, and what is advised where a run does not fit: the chunked loss and 8-bit optimizer states."""


def grid_rows() -> list[dict[str, Any]]:
    """Each cell of the grid, in a process of its own; a cell that cannot run says why."""
    rows = []
    for index, (model, plan) in enumerate(GRID):
        predicted = plan_trace(model, plan).peak_bytes
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(SCRIPT), "--cell", str(index)],
            capture_output=True,
            text=True,
            check=False,
        )
        row: dict[str, Any] = {"what": _name(model, plan), "traced": predicted}
        if done.returncode:
            row["reason"] = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
        else:
            row |= json.loads(done.stdout.splitlines()[-1])
            row["error"] = predicted / row["allocated"] - 1
        rows.append(row)
    return rows


def _name(model: str, plan: TrainingPlan) -> str:
    chunks = f", loss in chunks of {plan.loss_chunk_tokens}" if plan.loss_chunk_tokens else ""
    states = ", 8-bit AdamW" if plan.optimizer == "adamw_8bit" else ""
    return f"{model}, {plan.mode}, {plan.sequence_length} tokens{chunks}{states}"


def run_cell(index: int) -> dict[str, int]:
    """Two real steps on the GPU: peaks of the allocator and of what it reserved, and what lies outside, in bytes."""
    model_name, plan = GRID[index]
    torch.cuda.init()
    free, total = torch.cuda.mem_get_info()
    model = cuda_model(SHAPES[model_name], plan)
    batch = plan_batch(plan, "cuda")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run_steps(model, batch, plan_loop(plan, real=True))
    torch.cuda.synchronize()
    reserved = torch.cuda.memory_reserved()
    return {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "outside": total - torch.cuda.mem_get_info()[0] - reserved,
        "outside_before": total - free,
    }


def cuda_model(shape: dict[str, Any], plan: TrainingPlan) -> nn.Module:
    """The model on the GPU; 4-bit weights are bitsandbytes' own, packed one layer at a time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(shape)
    config = AutoConfig.for_model(values.pop("model_type"), use_cache=False, **values)
    with torch.device("cpu" if plan.mode == "qlora" else "cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    prepared = prepare(model, plan.mode, checkpointing=plan.checkpointing, rank=plan.lora_rank, bitsandbytes=True)
    return prepared.to("cuda")
