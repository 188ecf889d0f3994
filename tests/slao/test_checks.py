"""An adapter that does not fit is told so in words, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trainwarden.slao.checks import accumulator_problems, config_problems, fit_problems, layout_problems
from trainwarden.slao.factors import Kind, kind_of, partner_of, short

from .adapters import CONFIG, PREFIX, state

A = f"{PREFIX}.0.self_attn.q_proj.lora_A.weight"
B = f"{PREFIX}.0.self_attn.q_proj.lora_B.weight"

Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("key", "kind", "partner"),
    [
        ("x.q_proj.lora_A.weight", Kind.A, "x.q_proj.lora_B.weight"),
        ("x.q_proj.lora_B.weight", Kind.B, "x.q_proj.lora_A.weight"),
        ("x.embed_tokens.lora_embedding_A", Kind.A, "x.embed_tokens.lora_embedding_B"),
        ("x.embed_tokens.lora_embedding_B", Kind.B, "x.embed_tokens.lora_embedding_A"),
        ("x.q_proj.lora_magnitude_vector", Kind.MAGNITUDE, None),
        ("x.q_proj.lora_B.bias", Kind.WHOLE, None),
        ("x.lm_head.weight", Kind.WHOLE, None),
    ],
)
def test_a_key_tells_the_kind(key: str, kind: Kind, partner: str | None) -> None:
    assert kind_of(key) is kind
    assert partner_of(key) == partner


def test_messages_leave_out_what_peft_wraps_around() -> None:
    assert short(A) == "layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_peft_saves_is_whole(dtype: torch.dtype) -> None:
    assert layout_problems(state(dtype=dtype, dora=True), CONFIG) == []


LAYOUT: dict[str, tuple[Change, str]] = {
    "nothing": (lambda s: s.clear(), "it holds no LoRA factors"),
    "no B": (lambda s: s.pop(B), "q_proj.lora_A.weight has no layers.0.self_attn.q_proj.lora_B.weight"),
    "no A": (lambda s: s.pop(A), "q_proj.lora_B.weight has no layers.0.self_attn.q_proj.lora_A.weight"),
    "other rank": (lambda s: s.update({B: torch.zeros(6, 2)}), "has rank 3, and layers.0.self_attn.q_proj.lora_B"),
    "a list": (lambda s: s.update({A: [1.0]}), "is not a tensor but list"),
    "float64": (lambda s: s.update({A: s[A].double()}), "is float64; adapters are float32, bfloat16, float16"),
    "int8": (lambda s: s.update({A: s[A].to(torch.int8)}), "is int8"),
    "float8": (lambda s: s.update({A: s[A].to(torch.float8_e4m3fn)}), "is float8_e4m3fn"),
    "meta": (lambda s: s.update({A: s[A].to("meta")}), "holds no plain values"),
    "sparse": (lambda s: s.update({A: s[A].to_sparse()}), "holds no plain values"),
    "empty": (lambda s: s.update({A: torch.zeros(3, 0)}), "is empty: a shard"),
    "flat": (lambda s: s.update({A: torch.zeros(24)}), "has shape 24: a shard"),
    "flat B": (lambda s: s.update({B: torch.zeros(18)}), "has shape 18: a shard"),
}


@pytest.mark.parametrize("name", LAYOUT)
def test_an_adapter_that_is_not_whole_by_itself(name: str) -> None:
    change, said = LAYOUT[name]
    broken = dict(state())
    change(broken)
    assert said in layout_problems(broken)[0]


def test_ranks_are_those_of_the_configuration_where_it_says_one_for_all() -> None:
    assert "has rank 3, and its configuration says 4" in layout_problems(state(), {**CONFIG, "r": 4})[0]
    assert layout_problems(state(), {**CONFIG, "r": 4, "rank_pattern": {"q_proj": 3}}) == []
    assert layout_problems(state(), {**CONFIG, "r": 1, "target_parameters": ["experts"]}) == []
    assert layout_problems(state(), {}) == []


FIT: dict[str, tuple[Change, str]] = {
    "missing": (lambda s: (s.pop(A), s.pop(B)), "q_proj.lora_A.weight is missing"),
    "extra": (lambda s: s.update({"x.weight": torch.zeros(1)}), "x.weight is unknown to the accumulator"),
    "renamed": (lambda s: s.update({f"{A}x": s.pop(A)}), "q_proj.lora_A.weight is missing"),
    "shape": (lambda s: s.update({A: torch.zeros(3, 9)}), "has shape 3×9, and 3×8 in the accumulator"),
    "transposed": (lambda s: s.update({A: s[A].T}), "has shape 8×3, and 3×8"),
    "dtype": (lambda s: s.update({A: s[A].half()}), "is float16, and the accumulator's float32"),
}


@pytest.mark.parametrize("name", FIT)
def test_an_adapter_that_does_not_fit_the_accumulator(name: str) -> None:
    change, said = FIT[name]
    other = dict(state(1))
    change(other)
    assert said in fit_problems(other, state(0), dict.fromkeys(state(0), torch.float32))[0]


def test_the_same_layout_fits() -> None:
    assert fit_problems(state(1), state(0), dict.fromkeys(state(0), torch.float32)) == []
    assert fit_problems(state(1, dtype=torch.bfloat16), state(0)) == []


def test_an_accumulator_is_float32() -> None:
    assert accumulator_problems(state()) == []
    assert len(accumulator_problems(state(dtype=torch.float16))) == len(state())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lora_alpha": 12}, "lora_alpha is 12, and 6 in the accumulator"),
        ({"use_rslora": True}, "use_rslora is True, and False in the accumulator"),
        ({"use_dora": True}, "use_dora"),
        ({"r": 8}, "r is 8, and 3"),
        ({"alpha_pattern": {"q_proj": 1}}, "alpha_pattern"),
        ({"peft_type": "LOHA"}, "peft_type is LOHA"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_configuration_that_gives_the_tensors_another_meaning(change: dict[str, Any], said: str) -> None:
    assert said in config_problems({**CONFIG, **change}, CONFIG)[0]


def test_defaults_that_one_version_of_peft_writes_and_another_leaves_out_are_no_difference() -> None:
    written = {**CONFIG, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": None, "bias": "none"}
    assert config_problems(written, CONFIG) == []
    assert config_problems({**CONFIG, "lora_dropout": 0.1, "base_model_name_or_path": "elsewhere"}, CONFIG) == []
