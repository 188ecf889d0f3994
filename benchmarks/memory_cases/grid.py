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

GRID = tuple(
    (model, replace(plan, sequence_length=tokens))
    for model in ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B")
    for plan in (FULL, LORA, QLORA)
    for tokens in (512, 4096)
)


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
        row: dict[str, Any] = {"what": f"{model}, {plan.mode}, {plan.sequence_length} tokens", "traced": predicted}
        if done.returncode:
            row["reason"] = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
        else:
            row |= json.loads(done.stdout.splitlines()[-1])
            row["error"] = predicted / row["allocated"] - 1
        rows.append(row)
    return rows


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
    run_steps(model, batch, plan_loop(plan))
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
    if plan.mode == "qlora":
        _quantise(model)
    mode = "lora" if plan.mode == "qlora" else plan.mode
    return prepare(model, mode, checkpointing=plan.checkpointing, rank=plan.lora_rank).to("cuda")


def _quantise(model: nn.Module) -> None:
    import bitsandbytes as bnb  # only a GPU machine has it

    model.is_loaded_in_4bit = True  # type: ignore[assignment] # so that peft adapts the layers as 4-bit ones
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                packed = bnb.nn.Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=child.bias is not None,
                    compute_dtype=torch.bfloat16,
                    compress_statistics=True,
                    quant_type="nf4",
                )
                packed.weight = bnb.nn.Params4bit(
                    child.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
                )
                packed.bias = child.bias
                setattr(module, name, packed.to("cuda"))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
