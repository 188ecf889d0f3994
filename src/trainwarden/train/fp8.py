"""LoRA in FP8: the frozen linear layers of the base model compute in it, adapters and output layer stay as they are."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from trainwarden.capability import FP8_MULTIPLE, FP8_RECIPE
from trainwarden.guards.oom import is_out_of_memory
from trainwarden.train.gates import FP8_FALLBACK
from trainwarden.train.hub import first_line
from trainwarden.train.models import quiet_torchao

_ADAPTER = "lora_"
"""Every module of an adapter has a part with this beginning in its name: ``q_proj.lora_A.default``."""


@dataclass
class Plan:
    """Which linear layers of a model are to compute in FP8, by name, and how many are not, by reason."""

    convert: list[str] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)

    @property
    def sentence(self) -> str:
        """What a run says of it."""
        total = len(self.convert) + self.left.total()
        rest = f"; in bf16 stays {self.reasons}" if self.left else ""
        return f"FP8: {len(self.convert)} of {total} linear layers compute in it, adapters not counted{rest}"

    @property
    def reasons(self) -> str:
        """``1 (the output layer), 6 (a dimension is not divisible by 16)``."""
        return ", ".join(f"{count} ({reason})" for reason, count in sorted(self.left.items()))


def plan(model: nn.Module) -> Plan:
    """Decides for each linear layer that is no adapter's.

    FP8 products need both dimensions divisible by 16 (`trainwarden.capability.fp8_layers`).
    """
    result = Plan()
    output_of: Any = getattr(model, "get_output_embeddings", lambda: None)
    of_output = set(output.modules()) if (output := output_of()) is not None else set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or any(part.startswith(_ADAPTER) for part in name.split(".")):
            continue
        reason = _reason_to_leave(name, module, of_output)
        if reason is None:
            result.convert.append(name)
        else:
            result.left[reason] += 1
    return result


def _reason_to_leave(name: str, module: nn.Linear, of_output: Container[nn.Module]) -> str | None:
    if module in of_output or "lm_head" in name.split("."):
        return "the output layer"
    if type(module) is not nn.Linear or not module.weight.is_floating_point():
        return f"{type(module).__name__} is no plain linear layer"
    if module.weight.requires_grad:
        return "trained itself"
    if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
        return "hooks that a converted layer would not have"
    if module.in_features % FP8_MULTIPLE or module.out_features % FP8_MULTIPLE:
        return f"a dimension is not divisible by {FP8_MULTIPLE}"
    return None


@contextmanager
def frozen_layers_in_fp8(model: nn.Module, tell: Callable[[str], None], *, emulate: bool = False) -> Iterator[None]:
    """Lets the frozen linear layers of ``model`` compute in FP8 inside, and gives it back as it was.

    Parameters, their names and the adapters are untouched: the layers share them. ``tell`` gets one sentence: how
    many layers were converted and why others were not, or why none was, in which case it trains on in bf16.

    Args:
        model: with LoRA adapters; no layer of it must be an `nn.Linear` at the root.
        emulate: compute in float32 what FP8 would give, as on a GPU without FP8 or on a CPU.
    """
    planned = plan(model)
    modules = {name: model.get_submodule(name) for name in planned.convert}
    problem = _convert(model, modules, emulate) if modules else _nothing_to_convert(planned)
    tell(planned.sentence if problem is None else f"{FP8_FALLBACK}{problem}")
    try:
        yield
    finally:
        _put_back(model, modules)


def _nothing_to_convert(planned: Plan) -> str:
    if not planned.left:
        return "the model has no linear layer (torch.nn.Linear) besides adapters"
    return f"no linear layer of the model can be converted: {planned.reasons}"


def _convert(model: nn.Module, modules: dict[str, nn.Module], emulate: bool) -> str | None:
    """Why it failed, with the model as it was; None when it did not."""
    try:
        with quiet_torchao():
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training

            from trainwarden.train.fp8_linear import FrozenFloat8Linear
        config = dataclasses.replace(Float8LinearConfig.from_recipe_name(FP8_RECIPE), emulate=emulate)
        convert_to_float8_training(model, module_filter_fn=lambda _, name: name in modules, config=config)
    except (ImportError, AttributeError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        _put_back(model, modules)
        if is_out_of_memory(error):
            raise
        return f"torchao failed to convert the model: {type(error).__name__}: {first_line(error)}"
    for name in modules:
        model.get_submodule(name).__class__ = FrozenFloat8Linear
    return None


def _put_back(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        model.set_submodule(name, module)
