"""Tiny real models, data and a shortened `Trainer`, shared by the tests of this room."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from trainwarden.checkpoint import CheckpointStore
from trainwarden.train.rows import Chat, Message, Text

LLAMA: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 300,
    "max_position_embeddings": 128,
}
GPT2: Mapping[str, Any] = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 300}

WORDS = ["red", "green", "blue", "stone", "river", "cloud", "paper", "wind", "lamp", "door"]


def instructions(count: int) -> list[dict[str, str]]:
    """Rows of different lengths, each different from all others."""
    return [
        {
            "instruction": f"Say {WORDS[i % 10]} {i}",
            "output": " ".join(WORDS[(i + k) % 10] for k in range(2 + i % 7)),
        }
        for i in range(count)
    ]


def chat(*turns: tuple[str, str]) -> Chat:
    return Chat(tuple(Message(role, content) for role, content in turns))  # type: ignore[arg-type]


def corpus() -> list[Any]:
    rows: list[Any] = [chat(("user", row["instruction"]), ("assistant", row["output"])) for row in instructions(40)]
    return [*rows, Text("plain words to learn from: red green blue")]


def settings(**changes: Any) -> dict[str, Any]:
    """Arguments of a `Trainer` that trains for well under a second."""
    base: dict[str, Any] = {
        "mode": "full",
        "max_steps": 6,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "max_length": 64,
        "device": "cpu",
        "log_every_steps": 2,
        "observers": (),
    }
    return {**base, **changes}


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def model_weights(run_dir: Path) -> dict[str, Tensor]:
    """The published weights of a run: of the whole model, or of its adapter."""
    folder = run_dir / "model"
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def checkpoint_parts(run_dir: Path) -> dict[str, Any]:
    checkpoint = CheckpointStore(run_dir / "checkpoints").load_newest(on_rejected=lambda path, why: None)
    assert checkpoint is not None
    return checkpoint.parts


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The relative distance of all tensors concatenated, in float64."""
    assert a.keys() == b.keys()
    left = torch.cat([a[key].double().flatten() for key in sorted(a)])
    right = torch.cat([b[key].double().flatten() for key in sorted(a)])
    return float((left - right).norm() / right.norm())


def identical(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
