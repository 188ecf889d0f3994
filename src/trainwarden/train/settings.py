"""What a `Trainer` may be asked for: one rule a setting, checked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainwarden.capability import check_fp8_settings
from trainwarden.errors import InvalidSettingError
from trainwarden.errors.registry import known_names

Mode = Literal["lora", "qlora", "full"]
OptimizerChoice = Literal["adamw", "adamw_8bit"]
Schedule = Literal["linear", "cosine", "constant"]
DeviceChoice = Literal["auto", "cpu", "cuda"]
DtypeChoice = Literal["auto", "float32", "bfloat16", "float16"]
BackendChoice = Literal["auto", "cpu", "cuda", "mlx"]
BatchSize = int | Literal["auto"]


@dataclass(frozen=True)
class Rule:
    """A predicate over a setting's value, and the words for what it expects."""

    accepts: Callable[[Any], bool]
    expected: str


def whole(least: int, *, optional: bool = False) -> Rule:
    """A whole number of at least ``least``; ``True`` is not 1."""

    def accepts(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    return _optional(Rule(accepts, f"a whole number of at least {least}"), optional)


def number(
    least: float, most: float = math.inf, *, above: bool = False, below: bool = False, optional: bool = False
) -> Rule:
    """A finite number from ``least`` to ``most``; ``above`` and ``below`` leave the ends out."""

    def accepts(value: Any) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            return False
        return (value > least if above else value >= least) and (value < most if below else value <= most)

    lower = f"{'above' if above else 'of at least'} {least:g}"
    upper = "" if most == math.inf else f" and {'below' if below else 'at most'} {most:g}"
    return _optional(Rule(accepts, f"a finite number {lower}{upper}"), optional)


def one_of(*choices: str) -> Rule:
    """One of a few words."""
    return Rule(lambda value: isinstance(value, str) and value in choices, " or ".join(choices))


def flag() -> Rule:
    return Rule(lambda value: isinstance(value, bool), "true or false")


def _optional(rule: Rule, optional: bool) -> Rule:
    if not optional:
        return rule
    return Rule(lambda value: value is None or rule.accepts(value), f"{rule.expected}, or null")


def _is_names(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(item, str) for item in value)


def _is_codes(value: Any) -> bool:
    return _is_names(value) and all(code.upper() in known_names() for code in value)


def _or_auto(rule: Rule) -> Rule:
    return Rule(lambda value: value == "auto" or rule.accepts(value), f"{rule.expected}, or auto")


RULES: Mapping[str, Rule] = {
    "mode": one_of("lora", "qlora", "full"),
    "output_dir": Rule(lambda value: isinstance(value, str | Path) and str(value) != "", "a directory"),
    "max_steps": whole(1),
    "batch_size": _or_auto(whole(1)),
    "grad_accum_steps": whole(1),
    "learning_rate": number(0.0, above=True),
    "warmup_steps": whole(0),
    "schedule": one_of("linear", "cosine", "constant"),
    "weight_decay": number(0.0),
    "max_grad_norm": number(0.0, above=True, optional=True),
    "optimizer": one_of("adamw", "adamw_8bit"),
    "seed": whole(0),
    "max_length": whole(2),
    "limit": whole(1, optional=True),
    "eval_rows": whole(0),
    "log_every_steps": whole(1),
    "eval_every_steps": whole(0),
    "device": one_of("auto", "cpu", "cuda"),
    "dtype": one_of("auto", "float32", "bfloat16", "float16"),
    "backend": one_of("auto", "cpu", "cuda", "mlx"),
    "fp8": flag(),
    "full_ft_offload": flag(),
    "full_ft_ceiling_billions": number(0.0, above=True, optional=True),
    "gradient_checkpointing": flag(),
    "gradient_checkpointing_if_needed": flag(),
    "loss_chunk_tokens": whole(1, optional=True),
    "device_memory_bytes": whole(1, optional=True),
    "waive": Rule(_is_codes, "a list of codes of preflight findings"),
    "lora_rank": whole(1),
    "lora_alpha": number(0.0, above=True),
    "lora_dropout": number(0.0, 1.0, below=True),
    "lora_target_modules": Rule(
        lambda value: value == "all-linear" or (_is_names(value) and len(value) > 0),
        '"all-linear" or a list of module names',
    ),
    "oom_recovery": flag(),
    "max_shrinks": whole(0),
    "max_skipped_in_a_row": whole(0),
    "finite_action": one_of("skip", "rollback", "abort"),
    "spike_action": one_of("announce", "rollback", "abort"),
    "checkpoint_every_steps": whole(1, optional=True),
    "checkpoint_every_s": number(0.0, above=True, optional=True),
    "keep_last": whole(1),
    "resume": one_of("auto", "never", "must"),
    "accept_changes": Rule(_is_names, "a list of names"),
}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Checks each setting that has a rule, and those that must fit each other.

    Raises `InvalidSettingError` with setting, value and what is expected.
    """
    for name, value in settings.items():
        rule = RULES.get(name)
        if rule is not None and not rule.accepts(value):
            raise InvalidSettingError(setting=name, value=_shown(value), expected=rule.expected)
    if settings["warmup_steps"] >= settings["max_steps"]:
        expected = f"fewer than max_steps ({settings['max_steps']})"
        raise InvalidSettingError(setting="warmup_steps", value=settings["warmup_steps"], expected=expected)
    if settings["seed"] >= 2**32:
        raise InvalidSettingError(setting="seed", value=settings["seed"], expected="below 2**32, for NumPy's sake")
    if settings["eval_every_steps"] and not settings["eval_rows"] and settings["eval_dataset"] is None:
        expected = "0 without eval_dataset and eval_rows: there is nothing to evaluate on"
        raise InvalidSettingError(setting="eval_every_steps", value=settings["eval_every_steps"], expected=expected)
    if settings["eval_rows"] and settings["eval_dataset"] is not None:
        expected = "0 when an evaluation data set is given"
        raise InvalidSettingError(setting="eval_rows", value=settings["eval_rows"], expected=expected)
    _check_hardware_settings(settings)


def _check_hardware_settings(settings: Mapping[str, Any]) -> None:
    """What can be said of backend, FP8 and offload before the machine is asked."""
    backend, device = settings["backend"], settings["device"]
    if backend in ("cpu", "cuda") and device not in ("auto", backend):
        expected = f"auto or {device} with device {device}"
        raise InvalidSettingError(setting="backend", value=backend, expected=expected)
    if settings["fp8"]:
        check_fp8_settings(mode=settings["mode"])
        if settings["dtype"] not in ("auto", "bfloat16"):
            expected = f"false with dtype {settings['dtype']}: what is not computed in FP8 is computed in bfloat16"
            raise InvalidSettingError(setting="fp8", value=True, expected=expected)
    if settings["full_ft_offload"] and settings["gradient_checkpointing_if_needed"]:
        expected = "false with full_ft_offload: its ranks have to gather their weights equally often"
        raise InvalidSettingError(setting="gradient_checkpointing_if_needed", value=True, expected=expected)
    if settings["full_ft_offload"] and settings["mode"] != "full":
        expected = f"false with mode {settings['mode']}: it offloads the weights of full fine-tuning"
        raise InvalidSettingError(setting="full_ft_offload", value=True, expected=expected)
    if settings["full_ft_offload"] and settings["optimizer"] != "adamw":
        expected = "adamw with full_ft_offload: bitsandbytes cannot keep states of weights that lie in pieces"
        raise InvalidSettingError(setting="optimizer", value=settings["optimizer"], expected=expected)


def _shown(value: Any) -> Any:
    """NaN and infinity as words, because JSON has no way to write them."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
