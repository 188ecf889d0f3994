"""What a guard watches: the objects of a training loop, by name, and their state."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainwarden.errors import CheckpointError, InvalidSettingError
from trainwarden.runtime.gate import unwrapped
from trainwarden.runtime.sharded import (
    load_model_state,
    load_optimizer_state,
    whole_model_state,
    whole_optimizer_state,
)

GUARD_PART = "guard"
"""The checkpoint part that holds the guard's own state; no watched object may take the name."""


@dataclass(frozen=True)
class Watched:
    """Models, optimizers, schedulers, the scaler and whatever else has state, by name of checkpoint part.

    ``save_frozen=False`` leaves parameters that need no gradient out of checkpoints: the code that builds the model
    brings them back (a LoRA base model).
    """

    models: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    others: dict[str, Any]
    scaler: Any
    save_frozen: bool = True

    @classmethod
    def collect(
        cls,
        model: Any,
        optimizer: Any,
        scheduler: Any,
        scaler: Any,
        others: Mapping[str, Any],
        *,
        save_frozen: bool,
    ) -> Watched:
        """Sorts the arguments of ``Guard.watch``; one object or several (list, tuple, mapping) of each.

        Raises `InvalidSettingError` for what has no state or is of the wrong kind.
        """
        models = _named("model", model)
        optimizers = {name: unwrapped(one) for name, one in _named("optimizer", optimizer).items()}
        for name, one in models.items():
            _require(isinstance(one, nn.Module), name, one, "a torch.nn.Module")
        for name, one in optimizers.items():
            _require(hasattr(one, "param_groups"), name, one, "a torch optimizer")
        rest = {**_named("scheduler", scheduler), **others}
        if scaler is not None:
            rest["scaler"] = scaler
        for name, one in rest.items():
            stateful = hasattr(one, "state_dict") and hasattr(one, "load_state_dict")
            _require(stateful, name, one, "an object with state_dict and load_state_dict")
            free = re.fullmatch(r"[A-Za-z0-9_.-]+", name) and name not in {GUARD_PART, *models, *optimizers}
            _require(bool(free), name, one, "a free name of letters, digits, '_', '-' and '.'")
        return cls(models, optimizers, rest, scaler, save_frozen)

    def leaves(self) -> list[torch.Tensor]:
        """The parameters that the optimizers update, as they are now: groups may change during a run."""
        return [
            parameter
            for optimizer in self.optimizers.values()
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        ]

    def name_of(self, parameter: torch.Tensor) -> str:
        """``model.head.weight``; of a parameter that no watched model has, its place in its optimizer."""
        for name, model in self.models.items():
            for key, one in bare(model).named_parameters():
                if one is parameter:
                    return f"{name}.{key}"
        for name, optimizer in self.optimizers.items():
            for index, group in enumerate(optimizer.param_groups):
                for position, one in enumerate(group["params"]):
                    if one is parameter:
                        return f"{name}.groups[{index}].params[{position}]"
        return "a parameter"

    def state(self) -> dict[str, Any]:
        """The state of each object, by part. Tensors are those in use, not copies.

        What lies in pieces on several ranks is whole on rank 0 and None on the others: collective then.
        """
        parts: dict[str, Any] = {name: self._model_state(model) for name, model in self.models.items()}
        parts.update({name: whole_optimizer_state(optimizer) for name, optimizer in self.optimizers.items()})
        parts.update({name: other.state_dict() for name, other in self.others.items()})
        return parts

    def load_state(self, parts: Mapping[str, Any], path: str) -> None:
        """Puts saved parts back.

        Raises `CheckpointError` when a part is missing or does not fit its object.
        """
        targets = {**self.models, **self.optimizers, **self.others}
        missing = sorted(set(targets) - set(parts))
        if missing:
            problem = f"it has no part {', '.join(missing)}"
            raise CheckpointError(operation="load", path=path, problem=problem)
        for name, target in targets.items():
            try:
                if name in self.models:
                    self._load_model(target, parts[name])
                elif name in self.optimizers:
                    load_optimizer_state(target, parts[name])
                else:
                    target.load_state_dict(parts[name])
            except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
                problem = f"part {name} does not fit the {type(target).__name__} given to watch: {error}"
                raise CheckpointError(operation="load", path=path, problem=problem) from error

    def fingerprint(self) -> dict[str, Any]:
        """What decides the training besides data: parameter shapes and hyper-parameters, as flat readable keys."""
        facts: dict[str, Any] = {}
        for name, model in self.models.items():
            for parameter_name, parameter in bare(model).named_parameters():
                shape = "x".join(str(size) for size in parameter.shape)
                trained = "" if parameter.requires_grad else " frozen"
                facts[f"{name}.{parameter_name}"] = f"{str(parameter.dtype)[6:]}[{shape}]{trained}"
        for name, optimizer in self.optimizers.items():
            facts[f"{name}.type"] = type(optimizer).__name__
            for index, group in enumerate(optimizer.param_groups):
                for key, value in group.items():
                    if key != "params":
                        facts[f"{name}.groups[{index}].{key}"] = _plain(value)
        facts.update({f"{name}.type": type(other).__name__ for name, other in self.others.items()})
        return facts

    def _frozen(self, model: nn.Module) -> set[str]:
        if self.save_frozen:
            return set()
        parameters = bare(model).named_parameters(remove_duplicate=False)
        return {name for name, parameter in parameters if not parameter.requires_grad}

    def _model_state(self, model: nn.Module) -> dict[str, Any]:
        frozen = self._frozen(model)
        return {key: value for key, value in whole_model_state(bare(model)).items() if key not in frozen}

    def _load_model(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        absent, unexpected = load_model_state(bare(model), state)
        missing = absent - self._frozen(model)
        if missing or unexpected:
            raise KeyError(f"missing {sorted(missing)}, unexpected {sorted(unexpected)}")


def bare(model: nn.Module) -> nn.Module:
    """What DDP wraps: with names as in one process, so that a checkpoint goes on with any number of ranks."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], accepted: Sequence[str]) -> dict[str, Any]:
    """What differs between two fingerprints, as ``{key: {"saved": …, "now": …}}``, without what is accepted.

    An accepted name covers the key itself and everything below it (``optimizer`` covers ``optimizer.groups[0].lr``).
    """
    differing = {key for key in {*saved, *now} if saved.get(key) != now.get(key)}
    return {
        key: {"saved": saved.get(key, "absent"), "now": now.get(key, "absent")}
        for key in sorted(differing)
        if not any(key == name or key.startswith((f"{name}.", f"{name}[")) for name in accepted)
    }


def _named(kind: str, given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return {f"{kind}.{name}": one for name, one in given.items()}
    if isinstance(given, (list, tuple)):
        return {f"{kind}.{index}": one for index, one in enumerate(given)}
    return {kind: given}


def _require(condition: bool, setting: str, value: Any, expected: str) -> None:
    if not condition:
        raise InvalidSettingError(setting=f"watch({setting}=)", value=type(value).__name__, expected=expected)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
