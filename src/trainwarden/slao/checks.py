"""What an adapter must be before anything is computed with it. Finite values are `norms`' business."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .factors import Kind, State, keys_of, kind_of, partner_of, short

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What adapters are trained in. Eight-bit floats saturate or have no arithmetic: they are refused, not guessed at."""

SETTINGS: Mapping[str, Any] = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 8,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
    "layer_replication": None,
    "target_parameters": None,
}
"""The settings of peft's `LoraConfig` that decide what the tensors mean, with its defaults."""


def layout_problems(state: Mapping[str, object], config: Mapping[str, Any] | None = None) -> list[str]:
    """What is wrong with an adapter by itself, one sentence each; nothing when it is whole.

    Each A must have its B of the same rank, every tensor be dense, not empty and of one of `DTYPES`, and the
    ranks be those of the configuration where that says one for all.
    """
    problems = [f"{short(key)} {problem}" for key, value in state.items() if (problem := _tensor_problem(value))]
    if problems:
        return problems
    tensors: State = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not keys_of(Kind.A, tensors):
        return ["it holds no LoRA factors"]
    for key in tensors:
        problems += _pair_problems(key, tensors)
    return problems or _rank_problems(tensors, config or {})


def fit_problems(state: State, like: State, dtypes: Mapping[str, torch.dtype] | None = None) -> list[str]:
    """In what an adapter differs from the accumulator: keys, shapes, and dtypes where they are given."""
    problems = [f"{short(key)} is missing" for key in like if key not in state]
    problems += [f"{short(key)} is unknown to the accumulator" for key in state if key not in like]
    for key, value in state.items():
        if key not in like:
            continue
        if value.shape != like[key].shape:
            problems.append(f"{short(key)} has shape {_of(value.shape)}, and {_of(like[key].shape)} in the accumulator")
        elif dtypes is not None and value.dtype != dtypes.get(key):
            problems.append(f"{short(key)} is {_named(value.dtype)}, and the accumulator's {_named(dtypes.get(key))}")
    return problems


def accumulator_problems(state: Mapping[str, object]) -> list[str]:
    """Why this is no accumulator, as far as an adapter that fits it does not tell.

    It is float32: in 16 bits it would lose 0.4 % over 64 merges.
    """
    return [
        f"{short(key)} is {_named(value.dtype)}, and an accumulator is float32"
        if isinstance(value, Tensor)
        else f"{short(key)} is not a tensor but {type(value).__name__}"
        for key, value in state.items()
        if not (isinstance(value, Tensor) and value.dtype == torch.float32)
    ]


def config_problems(config: Mapping[str, Any], like: Mapping[str, Any]) -> list[str]:
    """Settings that change what the same tensors mean: another alpha would rescale the old tasks silently."""
    return [
        f"{name} is {_setting(config, name)}, and {_setting(like, name)} in the accumulator"
        for name in SETTINGS
        if _setting(config, name) != _setting(like, name)
    ]


def _setting(config: Mapping[str, Any], name: str) -> Any:
    value = config.get(name, SETTINGS[name])
    return SETTINGS[name] if value is None else value


def _tensor_problem(value: object) -> str | None:
    if not isinstance(value, Tensor):
        return f"is not a tensor but {type(value).__name__}"
    if value.dtype not in DTYPES:
        return f"is {_named(value.dtype)}; adapters are {', '.join(map(_named, DTYPES))}"
    if value.layout is not torch.strided or value.is_meta:
        return "holds no plain values"
    if value.numel() == 0:
        return "is empty: a shard that was not gathered before it was saved"
    return None


def _pair_problems(key: str, tensors: State) -> list[str]:
    kind, partner = kind_of(key), partner_of(key)
    if partner is None:
        return []
    if partner not in tensors:
        return [f"{short(key)} has no {short(partner)}"]
    if tensors[key].dim() < 2:
        return [f"{short(key)} has shape {_of(tensors[key].shape)}: a shard that was not gathered before it was saved"]
    if kind is Kind.A and tensors[partner].dim() >= 2 and tensors[key].shape[0] != tensors[partner].shape[1]:
        ranks = f"rank {tensors[key].shape[0]}, and {short(partner)} rank {tensors[partner].shape[1]}"
        return [f"{short(key)} has {ranks}"]
    return []


def _rank_problems(tensors: State, config: Mapping[str, Any]) -> list[str]:
    rank = config.get("r")
    if not isinstance(rank, int) or _setting(config, "rank_pattern") or _setting(config, "target_parameters"):
        return []
    return [
        f"{short(key)} has rank {tensors[key].shape[0]}, and its configuration says {rank}"
        for key in keys_of(Kind.A, tensors)
        if tensors[key].shape[0] != rank
    ]


def _of(shape: torch.Size) -> str:
    return "×".join(map(str, shape)) or "()"


def _named(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
