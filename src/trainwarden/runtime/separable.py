"""Which optimizers' steps can be finished in parts, and what has to be known of each for that."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainwarden.runtime.replay import Applied
from trainwarden.runtime.sharded import is_sharded

SEPARABLE = (
    "Adadelta Adafactor Adagrad Adam AdamW Adamax ASGD Muon NAdam RAdam RMSprop Rprop SGD".split()  # noqa: SIM905
)
"""Optimizers of torch that update each parameter by itself. LBFGS searches along all of them together, SparseAdam
replaces gradients, and an optimizer of somebody else's may keep what no version counter shows."""

NOT_LOCAL = ("Adafactor", "Muon")
"""They reduce over a whole parameter: with a distributed one every rank has to take part, so one cannot go again."""


def why_not_separable(optimizer: torch.optim.Optimizer, step: Callable[..., Any]) -> str | None:
    """Why the step of this optimizer cannot be finished in parts, whatever it is given; ``None``: it can."""
    kind = type(optimizer)
    known = next((base for base in kind.__mro__ if getattr(torch.optim, base.__name__, None) is base), None)
    if known is None or known.__name__ not in SEPARABLE:
        return f"{kind.__name__} is not known to update each parameter by itself"
    if inspect.unwrap(kind.step) is not inspect.unwrap(known.step) or _init_group(kind) is not _init_group(known):
        return f"{kind.__name__} has a step of its own"
    function = getattr(step, "__func__", step)
    if hasattr(function, "_wrapped_by_lr_sched"):  # the scheduler's wrapper only notes the call
        function = getattr(function, "__wrapped__", function)
    if function is not kind.step:
        return f"the step of this {kind.__name__} has been replaced"
    return None


def _init_group(kind: type) -> Any:
    return getattr(kind, "_init_group", None)


def why_not_now(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> str | None:
    """Why this step of a separable optimizer cannot be finished in parts; ``None``: it can."""
    name = type(optimizer).__name__
    for group in optimizer.param_groups:
        if group.get("differentiable"):
            return "a differentiable step keeps all temporaries"
        present = [p for p in group["params"] if p.grad is not None]
        if len({(type(p), p.device.type) for p in present}) > 1:
            return "parameters of one group are of several kinds, and torch chooses its implementation by all of them"
    if any(p.grad is not None and p.grad.is_sparse for p in parameters):
        return "a gradient is sparse"
    if name in NOT_LOCAL and any(map(is_sharded, parameters)):
        return f"{name} needs every rank for a distributed parameter"
    return None


def body_of(kind: type[torch.optim.Optimizer]) -> Callable[..., Any]:
    """``step`` without the hooks around it."""
    step: Any = kind.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[no-any-return]


def without_states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters that this step will make states for."""
    state, plain_sgd = optimizer.state, isinstance(optimizer, torch.optim.SGD)
    for group in optimizer.param_groups:
        if not all(map(state.get, group["params"])):
            break
    else:
        return []  # every step but the first: on the step path
    return [
        parameter
        for group in optimizer.param_groups
        if not (plain_sgd and not group["momentum"])
        for parameter in group["params"]
        if parameter.grad is not None and not state.get(parameter)
    ]


def works_on_lists(group: Mapping[str, Any]) -> bool:
    """Whether torch may update the parameters of a group together: asked for, or chosen because of their device."""
    first = next(iter(group["params"]), None)
    if first is None:
        return False
    if group.get("fused") or group.get("foreach") or is_sharded(first):
        return True
    # torch works on lists only if all parameters are on such a device, so one of them tells enough.
    return group.get("foreach") is None and first.device.type != "cpu"


def runs_one_kernel_a_group(optimizer: torch.optim.Optimizer) -> bool:
    """Whether each group is updated by one fused kernel, before which the group's step counters are raised.

    One kernel for each device and type, so a group must be of one kind; and the raising must show in the counters'
    versions, which is tried. Fused SGD counts no steps.
    """
    for group in optimizer.param_groups:
        kinds = {(p.device, p.dtype) for p in group["params"]}
        if not group.get("fused") or len(kinds) != 1:
            return False
    counters = step_counters(optimizer)
    if len(counters) != len(optimizer.param_groups):
        return False
    probes = [torch.zeros_like(counter) for counter in counters.values()]
    versions = [probe._version for probe in probes]
    for probe in probes:
        torch._foreach_add_([probe], 1)
    return all(probe._version > version for probe, version in zip(probes, versions, strict=True))


def step_counters(optimizer: torch.optim.Optimizer) -> dict[int, Tensor]:
    """By position of the group, the step counter of one parameter to be updated: those of a group rise together."""
    state = optimizer.state
    counters = {}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter.grad is not None:
                step = (state.get(parameter) or {}).get("step")
                if isinstance(step, Tensor):
                    counters[index] = step
                break
    return counters


def take_back_decay(optimizer: torch.optim.Optimizer, part: Sequence[Tensor], applied: Applied) -> None:
    """Adafactor scales its update by the norm of the undecayed weight, so a replay needs that weight once more.

    Exact up to one rounding. A weight that has received both its operations is done.
    """
    if not isinstance(optimizer, torch.optim.Adafactor):
        return
    chosen = set(map(id, part))
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                decayed = group["weight_decay"] != 0 and applied.get(id(parameter)) == 1
                if decayed and id(parameter) in chosen:
                    parameter.div_(1 - float(group["lr"]) * group["weight_decay"])
                    del applied[id(parameter)]
