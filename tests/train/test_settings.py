"""What may be asked of a `Trainer`: every refusal names the setting, its value and what is expected."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwarden.errors import InvalidSettingError
from trainwarden.train.settings import RULES
from trainwarden.train.trainer import Trainer

ROWS = [{"text": "one"}]


def trainer(**settings: Any) -> Trainer:
    return Trainer("a/model", ROWS, **{"max_steps": 5, "output_dir": "runs/x", **settings})


def test_defaults_are_accepted() -> None:
    trainer()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_steps", -1),
        ("max_steps", 0),
        ("max_steps", True),
        ("max_steps", 1.5),
        ("max_steps", "5"),
        ("batch_size", 0),
        ("batch_size", False),
        ("grad_accum_steps", 0),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("learning_rate", 0.0),
        ("learning_rate", -1e-3),
        ("learning_rate", True),
        ("learning_rate", "1e-3"),
        ("weight_decay", -0.1),
        ("max_grad_norm", 0.0),
        ("warmup_steps", -1),
        ("warmup_steps", 5),
        ("schedule", "sine"),
        ("optimizer", "adam"),
        ("mode", "dora"),
        ("optimizer", "sgd"),
        ("loss_chunk_tokens", 0),
        ("loss_chunk_tokens", "auto"),
        ("mode", None),
        ("seed", -1),
        ("seed", 2**32),
        ("max_length", 1),
        ("limit", 0),
        ("eval_rows", -1),
        ("eval_every_steps", 5),
        ("log_every_steps", 0),
        ("device", "cuda:7"),
        ("dtype", "float64"),
        ("backend", "tpu"),
        ("backend", None),
        ("fp8", 1),
        ("fp8", "yes"),
        ("full_ft_offload", 0),
        ("full_ft_offload", True),
        ("lora_rank", 0),
        ("lora_alpha", 0),
        ("lora_dropout", 1.0),
        ("lora_target_modules", "q_proj"),
        ("lora_target_modules", []),
        ("lora_target_modules", [1]),
        ("oom_recovery", 1),
        ("oom_recovery", "yes"),
        ("max_shrinks", -1),
        ("max_skipped_in_a_row", -1),
        ("checkpoint_every_steps", 0),
        ("checkpoint_every_s", 0),
        ("keep_last", 0),
        ("resume", "yes"),
        ("accept_changes", "max_steps"),
        ("output_dir", ""),
        ("output_dir", None),
    ],
)
def test_a_value_out_of_range_is_named_at_construction(setting: str, value: Any) -> None:
    with pytest.raises(InvalidSettingError) as caught:
        trainer(**{setting: value})
    assert caught.value.details["setting"] == setting
    assert caught.value.details["expected"]
    assert caught.value.exit_code == 78
    json.dumps(caught.value.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("limit", None),
        ("max_grad_norm", None),
        ("checkpoint_every_steps", None),
        ("checkpoint_every_s", None),
        ("checkpoint_every_s", 5),
        ("learning_rate", 1),
        ("warmup_steps", 4),
        ("lora_target_modules", ["q_proj"]),
        ("accept_changes", ["max_steps"]),
    ],
)
def test_a_value_in_range_is_accepted(setting: str, value: Any) -> None:
    trainer(**{setting: value})


def test_evaluation_rows_and_an_evaluation_set_exclude_each_other() -> None:
    with pytest.raises(InvalidSettingError, match="eval_rows"):
        trainer(eval_rows=1, eval_dataset=ROWS)


@pytest.mark.parametrize("model", [None, "", "  ", {}, 7, ["llama"]])
def test_a_model_must_be_something_to_load_or_build(model: Any) -> None:
    with pytest.raises(InvalidSettingError, match="model"):
        Trainer(model, ROWS, max_steps=1, output_dir="runs/x")


@pytest.mark.parametrize("rows", [None, "", 7, b"bytes", {"text": "one"}, iter(ROWS)])
def test_a_data_set_must_be_a_path_or_rows(rows: Any) -> None:
    with pytest.raises(InvalidSettingError, match="train_dataset"):
        Trainer("a/model", rows, max_steps=1, output_dir="runs/x")


def test_a_model_object_needs_its_tokenizer() -> None:
    import torch

    with pytest.raises(InvalidSettingError, match="tokenizer"):
        Trainer(torch.nn.Linear(1, 1), ROWS, max_steps=1, output_dir="runs/x")


ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers()) | st.binary()


@given(st.dictionaries(st.sampled_from(sorted(RULES)), ANYTHING, min_size=1))
def test_no_value_whatever_raises_anything_else(values: dict[str, Any]) -> None:
    try:
        trainer(**values)
    except InvalidSettingError as error:
        json.dumps(error.to_dict(), allow_nan=False)
