"""From a configuration to a training: every key of the file arrives where it belongs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.tiny import LLAMA, instructions, write_jsonl
from trainwarden.slao import load_campaign
from trainwarden.train import run_from_config
from trainwarden.train.config import TrainConfig, load_config
from trainwarden.train.run import trainer_from_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
OTHERS: dict[str, Any] = {
    "data": {"max_length": 33, "limit": 7, "eval_rows": 2},
    "trainer": {
        "batch_size": 3,
        "grad_accum_steps": 2,
        "learning_rate": 0.5,
        "max_steps": 9,
        "warmup_steps": 1,
        "schedule": "linear",
        "weight_decay": 0.25,
        "max_grad_norm": None,
        "seed": 5,
        "log_every_steps": 3,
        "eval_every_steps": 4,
        "device": "cpu",
        "backend": "cpu",
    },
    "guard": {
        "oom_recovery": False,
        "max_shrinks": 1,
        "max_skipped_in_a_row": 2,
        "checkpoint_every_steps": 3,
        "checkpoint_every_s": None,
        "keep_last": 4,
        "resume": "never",
        "accept_changes": ["data"],
    },
}
MODEL: dict[str, Any] = {
    "mode": "full",
    "lora_rank": 2,
    "lora_alpha": 3.0,
    "lora_dropout": 0.5,
    "lora_target_modules": ["q_proj"],
    "dtype": "float32",
}


def config(tmp_path: Path, **model: Any) -> TrainConfig:
    data = {"train": "rows.jsonl", **OTHERS["data"]}
    tree = {"output_dir": str(tmp_path), "model": {**MODEL, **model}, **OTHERS, "data": data}
    return TrainConfig.from_dict(tree, place="test")


def test_every_key_reaches_the_trainer(tmp_path: Path) -> None:
    trainer = trainer_from_config(config(tmp_path, name_or_path="some/model"))
    assert (trainer.model, trainer.train_dataset, trainer.output_dir) == ("some/model", "rows.jsonl", str(tmp_path))
    for section in (MODEL, OTHERS["data"], OTHERS["trainer"], OTHERS["guard"]):
        for key, value in section.items():
            assert getattr(trainer, key) == value, key


def test_every_setting_of_the_trainer_can_be_written_in_a_file(tmp_path: Path) -> None:
    """What a file cannot say is what only Python can: objects."""
    named = {"model", "train_dataset", "eval_dataset", "output_dir", "tokenizer"}
    named |= {"observers", "command", "config", "on_loaded"}
    sections = config(tmp_path, name_or_path="x").to_dict()
    keys = {key for section in ("model", "data", "trainer", "guard") for key in sections[section]}
    trainer = trainer_from_config(config(tmp_path, name_or_path="x"))
    assert {field.name for field in dataclasses.fields(trainer)} - named <= keys


def test_a_new_model_is_its_mapping(tmp_path: Path) -> None:
    assert trainer_from_config(config(tmp_path, config=dict(LLAMA))).model == LLAMA


def test_a_run_keeps_the_configuration_it_can_be_resumed_with(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", instructions(12))
    tree = {
        "output_dir": str(tmp_path / "run"),
        "model": {"config": dict(LLAMA), "mode": "full"},
        "data": {"train": str(rows), "max_length": 48},
        "trainer": {"learning_rate": 0.01, "max_steps": 2, "device": "cpu"},
    }
    asked = TrainConfig.from_dict(tree, place="test")
    result = run_from_config(asked, observers=())
    assert result.steps_completed == 2
    stored = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert TrainConfig.from_dict(stored, place="run.json") == asked


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.name != "slao.yaml"], ids=lambda path: path.name)
def test_each_shipped_configuration_loads_and_makes_a_trainer(path: Path) -> None:
    trainer_from_config(load_config(path, environ={}).config)


def test_the_shipped_campaign_makes_a_trainer_of_each_task() -> None:
    campaign = load_campaign(next(path for path in CONFIGS if path.name == "slao.yaml"), environ={})
    assert [trainer_from_config(task.config).mode for task in campaign.tasks] == ["lora"] * 3


def test_the_loaded_model_is_handed_over_once_with_its_adapters(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", instructions(12))
    tree = {
        "output_dir": str(tmp_path / "run"),
        "model": {"config": dict(LLAMA), "mode": "lora"},
        "data": {"train": str(rows), "max_length": 32},
        "trainer": {"max_steps": 1, "device": "cpu"},
    }
    seen: list[Any] = []

    def on_loaded(model: Any) -> None:
        seen.append([name for name, parameter in model.named_parameters() if parameter.requires_grad])

    trainer_from_config(TrainConfig.from_dict(tree, place="test"), observers=(), on_loaded=on_loaded).train()
    assert len(seen) == 1
    assert all("lora_" in name for name in seen[0])


def test_the_three_main_uses_are_shipped() -> None:
    assert {"quickstart.yaml", "lora.yaml", "full.yaml"} <= {path.name for path in CONFIGS}
