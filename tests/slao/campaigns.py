"""Tiny campaigns: a base model, three data sets that pull in different directions, and what came out of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.train.tiny import instructions
from trainwarden import slao
from trainwarden.events import Event
from trainwarden.slao.campaign import Campaign
from trainwarden.slao.campaign_config import CampaignConfig, load_campaign
from trainwarden.slao.campaign_result import CampaignResult
from trainwarden.train import models
from trainwarden.train.data import read_rows

MODEL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 32,
}
WORDS = {"a": "red", "b": "stone", "c": "lamp"}
CONFIG = """\
output_dir: campaign
model: {name_or_path: base, lora_rank: 2, lora_target_modules: [q_proj, v_proj]}
data: {eval_rows: 2, max_length: 32}
trainer: {max_steps: 3, learning_rate: 2e-2, batch_size: 4, device: cpu}
guard: {checkpoint_every_steps: 1, max_skipped_in_a_row: 0}
tasks:
  a: {data: {train: a.jsonl}}
  b: {data: {train: b.jsonl}}
  c: {data: {train: c.jsonl}}
"""
TWO = "tasks.c=null"
"""An override that leaves the last task out."""
NAN = "tasks.b.trainer.learning_rate=1e30"
"""An override with which the weights of task b leave every range in its first step."""


def save_base(directory: Path) -> Path:
    """A base model with random weights and a tokenizer."""
    tokenizer = models.tokenizer_for_config(MODEL, read_rows(instructions(30)))
    torch.manual_seed(5)
    models.build_model(MODEL, tokenizer, dtype=torch.float32).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_work(directory: Path, base: Path) -> Path:
    """Everything that the configuration names."""
    (directory / "base").symlink_to(base)
    (directory / "campaign.yaml").write_text(CONFIG)
    for name, word in WORDS.items():
        rows = [{"instruction": f"say {k}", "output": f"{word} {word} {word}"} for k in range(10)]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def loaded(*overrides: str) -> CampaignConfig:
    """The campaign of the current directory."""
    return load_campaign("campaign.yaml", overrides, {})


class Told:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def names(self) -> list[str]:
        return [event.name for event in self.events]

    def said(self, part: str) -> list[str]:
        return [str(event) for event in self.events if part in str(event)]

    def steps_trained(self) -> int:
        return self.names().count("step_completed")


def run(*overrides: str, observers: Sequence[Any] = ()) -> CampaignResult:
    """Run the campaign of the current directory."""
    return Campaign(loaded(*overrides), observers=observers).run()


def accumulator(directory: str = "campaign") -> dict[str, Tensor]:
    """What was merged."""
    snapshot = slao.SlaoStore(Path(directory) / "merged").current()
    assert snapshot is not None
    return snapshot.merged


def merged_tasks(directory: str = "campaign") -> list[str]:
    """The sources of what is in the accumulator; none before the first merge."""
    snapshot = slao.SlaoStore(Path(directory) / "merged").current()
    return [] if snapshot is None else [record.source for record in snapshot.history]
