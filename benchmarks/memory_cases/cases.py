"""Small trainings that are run and predicted: the fixed ones and the drawn ones, and how they are built."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from trainwarden.memory.prediction import Prediction
from trainwarden.memory.trace import TrainingLoop, default_loss, trace
from trainwarden.memory.trace_optimizers import AdamW8bit
from trainwarden.memory.trace_packed import pack_linears

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PLAIN = ("mlp", "conv", "encoder")
DECODERS = ("llama", "qwen2", "mistral", "gemma", "gpt2", "opt", "gpt_neox")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training, small enough to be run. ``family`` is a model type of transformers or one of `PLAIN`."""

    name: str
    family: str = "qwen2"
    width: int = 256
    layers: int = 4
    vocab: int = 4000
    rows: int = 2
    tokens: int = 256
    mode: str = "full"
    dtype: str = "fp32"
    optimizer: str = "adamw"
    attention: str = "sdpa"
    checkpointing: bool = False
    grad_accum_steps: int = 1
    autocast: bool = False
    max_grad_norm: float | None = None
    optimizer_in_backward: bool = False
    padded: bool = False
    """The batch has a mask that masks something."""
    tied: bool = False
    """The head uses the weights of the embedding; some families do always."""
    loss_chunk_tokens: int | None = None
    bitsandbytes: bool = False
    """Packed layers and 8-bit optimizers are really those of bitsandbytes; the trace has stand-ins for both."""


CASES = (
    Case(name="AdamW"),
    Case(name="AdamW foreach", optimizer="adamw_foreach"),
    Case(name="AdamW fused", optimizer="adamw_fused"),
    Case(name="SGD with momentum", optimizer="sgd"),
    Case(name="bf16, fused", dtype="bf16", optimizer="adamw_fused"),
    Case(name="bf16, foreach, many weights", dtype="bf16", optimizer="adamw_foreach", width=512, rows=1, tokens=32),
    Case(name="weights outweigh activations", width=512, rows=1, tokens=16),
    Case(name="checkpointing", checkpointing=True, vocab=500, tokens=1024),
    Case(name="checkpointing, bf16", checkpointing=True, dtype="bf16", optimizer="adamw_fused"),
    Case(name="accumulation over 3", grad_accum_steps=3),
    Case(name="clipping", max_grad_norm=1.0),
    Case(name="autocast", autocast=True),
    Case(name="optimizer in backward", optimizer_in_backward=True, optimizer="adamw_fused"),
    Case(name="8-bit AdamW (stand-in)", optimizer="adamw_8bit", width=512, tokens=32),
    Case(name="8-bit AdamW (bitsandbytes)", optimizer="adamw_8bit", bitsandbytes=True),
    Case(name="tied embeddings", tied=True, vocab=16000, tokens=64, optimizer="adamw_fused"),
    Case(name="tied embeddings, bf16", tied=True, vocab=16000, tokens=16, optimizer="adamw_fused", dtype="bf16"),
    Case(name="tied embeddings, autocast", tied=True, vocab=16000, tokens=16, optimizer="adamw_fused", autocast=True),
    Case(name="tied, accumulation", tied=True, vocab=16000, tokens=64, grad_accum_steps=2, optimizer="adamw_fused"),
    Case(name="chunked loss", loss_chunk_tokens=64, vocab=16000, optimizer="adamw_fused"),
    Case(name="chunked loss, tied", loss_chunk_tokens=64, vocab=16000, tied=True, optimizer="adamw_fused"),
    Case(name="chunked loss, autocast, checkpointing", loss_chunk_tokens=64, autocast=True, checkpointing=True),
    Case(name="chunked loss, LoRA, bf16", loss_chunk_tokens=64, mode="lora", dtype="bf16", vocab=16000),
    Case(name="eager attention", attention="eager", tokens=512, vocab=500),
    Case(name="padded batch", padded=True, rows=4),
    Case(name="12 layers (extended)", layers=12, tokens=128),
    Case(name="12 layers, LoRA, checkpointing (extended)", layers=12, mode="lora", checkpointing=True, tokens=512),
    Case(name="LoRA, bf16", mode="lora", dtype="bf16"),
    Case(name="LoRA, bf16, checkpointing", mode="lora", dtype="bf16", checkpointing=True),
    Case(name="LoRA, autocast", mode="lora", dtype="bf16", autocast=True),
    Case(name="LoRA, accumulation", mode="lora", grad_accum_steps=2, max_grad_norm=1.0),
    Case(name="QLoRA (packed stand-in)", mode="qlora", dtype="bf16", width=512),
    Case(name="QLoRA (packed stand-in), checkpointing", mode="qlora", dtype="bf16", checkpointing=True),
    Case(name="QLoRA (bitsandbytes)", mode="qlora", dtype="bf16", width=512, bitsandbytes=True),
    Case(name="QLoRA (bitsandbytes), checkpointing", mode="qlora", checkpointing=True, width=512, bitsandbytes=True),
    Case(
        name="QLoRA (bitsandbytes), 8-bit AdamW, chunked loss",
        mode="qlora",
        dtype="bf16",
        optimizer="adamw_8bit",
        loss_chunk_tokens=64,
        vocab=16000,
        bitsandbytes=True,
    ),
    Case(name="llama", family="llama"),
    Case(name="gpt2", family="gpt2"),
    Case(name="gemma", family="gemma", vocab=8000),
    Case(name="opt", family="opt"),
    Case(name="bert", family="bert"),
    Case(name="t5", family="t5"),
    Case(name="mixtral, bf16", family="mixtral", dtype="bf16"),
    Case(name="MLP", family="mlp", width=1024, rows=512, layers=8),
    Case(name="nn.TransformerEncoder", family="encoder"),
)
OUTSIDE = (Case(name="convolutions", family="conv", width=32, rows=16, layers=4),)
"""Not claimed: on the CPU, oneDNN's convolutions copy their tensors into layouts of their own, inside the kernel."""


def drawn_cases(count: int, seed: int) -> list[Case]:
    """Cases of random architecture, mode, type, batch, sequence, checkpointing and optimizer.

    Large enough that what kernels allocate for themselves (some 100 KiB) does not decide.
    """
    draw = random.Random(seed)
    return [_drawn(draw, f"drawn {seed}.{number}") for number in range(count)]


def _drawn(draw: random.Random, name: str) -> Case:
    family = draw.choice([*DECODERS, "bert", "t5", "mlp", "encoder"])
    plain = family in PLAIN
    mode = "full" if plain or family in ("bert", "t5") else draw.choice(["full", "full", "lora", "qlora"])
    in_backward = draw.random() < 0.15
    return Case(
        name=name,
        family=family,
        width=draw.choice([512, 1024]) if family == "mlp" else draw.choice([192, 256, 384]),
        layers=draw.choice([2, 3, 5, 10]),
        vocab=draw.choice([2000, 8000, 16000]),
        rows=draw.choice([16, 64]) if plain else draw.choice([1, 2, 3, 5]),
        tokens=128 if family == "encoder" else draw.choice([200, 256, 512]),
        mode=mode,
        dtype="bf16" if mode == "qlora" else draw.choice(["fp32", "bf16"]),
        optimizer=draw.choice(["adamw", "adamw_foreach", "adamw_fused", "adamw_8bit", "sgd"]),
        attention="sdpa" if plain else draw.choice(["sdpa", "sdpa", "eager"]),
        checkpointing=not plain and draw.random() < 0.4,
        grad_accum_steps=1 if in_backward else draw.choice([1, 1, 2, 4]),
        autocast=not plain and draw.random() < 0.2,
        max_grad_norm=None if in_backward or draw.random() < 0.5 else 1.0,
        optimizer_in_backward=in_backward,
        padded=not plain and draw.random() < 0.3,
        tied=family in DECODERS and draw.random() < 0.3,
        loss_chunk_tokens=draw.choice([None, None, 64, 200]) if family in DECODERS else None,
    )


def config_of(case: Case) -> Any:
    """transformers' configuration of a case; not for plain modules."""
    from transformers import AutoConfig

    w, n, heads = case.width, case.layers, 4
    common = {"vocab_size": case.vocab, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if case.tied:
        common["tie_word_embeddings"] = True
    sizes: dict[str, Any] = {
        "gpt2": {"n_embd": w, "n_layer": n, "n_head": heads},
        "t5": {"d_model": w, "d_kv": w // heads, "d_ff": 2 * w, "num_layers": n, "num_heads": heads}
        | {"decoder_start_token_id": 0},
        "opt": {"hidden_size": w, "ffn_dim": 4 * w, "num_hidden_layers": n, "num_attention_heads": heads}
        | {"word_embed_proj_dim": w},
    }
    usual = {"hidden_size": w, "intermediate_size": 3 * w, "num_hidden_layers": n, "num_attention_heads": heads}
    if case.family not in ("bert", "gpt_neox"):
        usual |= {"num_key_value_heads": 2}
    if case.family == "mixtral":
        usual |= {"num_local_experts": 4}
    return AutoConfig.for_model(case.family, **common, **sizes.get(case.family, usual))


def build(case: Case, *, real: bool = False) -> nn.Module:
    """The model of a case, on the default device, in training mode. ``real``: as of `loop_of`."""
    if case.family == "mlp":
        layers = [layer for _ in range(case.layers) for layer in (nn.Linear(case.width, case.width), nn.GELU())]
        return nn.Sequential(*layers).to(DTYPES[case.dtype])
    if case.family == "encoder":
        layer = nn.TransformerEncoderLayer(case.width, 4, 4 * case.width, batch_first=True)
        return nn.TransformerEncoder(layer, case.layers).to(DTYPES[case.dtype])
    if case.family == "conv":
        widths = [3, *[case.width] * case.layers]
        parts = [p for a, b in pairwise(widths) for p in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
        return nn.Sequential(*parts, nn.Flatten(), nn.LazyLinear(10)).to(DTYPES[case.dtype])
    import transformers

    autos = {"bert": transformers.AutoModelForMaskedLM, "t5": transformers.AutoModelForSeq2SeqLM}
    auto = autos.get(case.family, transformers.AutoModelForCausalLM)
    model = auto.from_config(config_of(case), dtype=DTYPES[case.dtype], attn_implementation=case.attention)
    return prepare(model, case.mode, checkpointing=case.checkpointing, bitsandbytes=real and case.bitsandbytes)


def prepare(model: Any, mode: str, *, checkpointing: bool, rank: int = 8, bitsandbytes: bool = False) -> nn.Module:
    """Packs, checkpoints and adapts a model as its mode asks for; really, or with stand-ins for what packs."""
    from peft import LoraConfig, get_peft_model

    from trainwarden.train.quantized import pack, prepare_packed

    if mode == "qlora" and bitsandbytes:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        pack(model, model.dtype)
        prepare_packed(model)
    elif mode == "qlora":
        pack_linears(model, compute_dtype=model.dtype)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if mode != "full":
        if checkpointing:
            model.enable_input_require_grads()
        settings = LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, settings)
    trained: nn.Module = model.train()
    return trained


def batch_of(case: Case) -> Any:
    """One micro-batch on the CPU."""
    if case.family == "mlp":
        return torch.zeros(case.rows, case.width, dtype=DTYPES[case.dtype])
    if case.family == "encoder":
        return torch.zeros(case.rows, case.tokens, case.width, dtype=DTYPES[case.dtype])
    if case.family == "conv":
        return torch.zeros(case.rows, 3, 32, 32, dtype=DTYPES[case.dtype])
    ids = torch.randint(3, case.vocab, (case.rows, case.tokens))
    mask = torch.ones_like(ids)
    if case.padded:
        mask[0, case.tokens // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}


def loop_of(case: Case, *, real: bool = False) -> TrainingLoop:
    """The step of a case. ``real``: with bitsandbytes itself, where the case asks for it."""
    from trainwarden.train.chunked_loss import chunked_loss
    from trainwarden.train.quantized import adamw_8bit

    makers: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        "adamw": lambda p: torch.optim.AdamW(p, foreach=False),
        "adamw_foreach": lambda p: torch.optim.AdamW(p, foreach=True),
        "adamw_fused": lambda p: torch.optim.AdamW(p, fused=True),
        "adamw_8bit": AdamW8bit,
        "bitsandbytes": lambda p: adamw_8bit([{"params": p}], learning_rate=1e-3),
        "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, foreach=False),
    }
    name = "bitsandbytes" if real and case.bitsandbytes and case.optimizer == "adamw_8bit" else case.optimizer
    chunk = case.loss_chunk_tokens
    return TrainingLoop(
        compute_loss=default_loss if chunk is None else partial(chunked_loss, chunk_tokens=chunk),
        make_optimizer=makers[name],
        grad_accum_steps=case.grad_accum_steps,
        autocast=torch.bfloat16 if case.autocast else None,
        max_grad_norm=case.max_grad_norm,
        optimizer_in_backward=case.optimizer_in_backward,
    )


def traced(case: Case) -> Prediction:
    """The prediction for the CPU's allocator."""
    return trace(lambda: on_meta(case), batch_of(case), loop_of(case), device_type="cpu")


def on_meta(case: Case) -> nn.Module:
    model = build(case)
    if case.family == "conv":
        with torch.no_grad():
            model(torch.zeros(case.rows, 3, 32, 32, dtype=DTYPES[case.dtype], device="meta"))
    return model
