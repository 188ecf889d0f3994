"""Whether the weights and the optimizer's state are finite: looked at before every checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from trainwarden.guards.finite import Kind
from trainwarden.runtime.culprit import first_named, values_of
from trainwarden.runtime.finite_check import norms_of


def first_bad_state(
    models: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]
) -> tuple[str, Kind] | None:
    """Name and kind of the first trained parameter or optimizer state that is not finite, on this rank.

    Frozen parameters and buffers are not looked at: a mask may hold infinities on purpose. Of the optimizer's state,
    tensors of their parameter's size are. One reduction; an exact pass only when that raises an alarm.
    """
    named = [(name, tensor) for name, tensor in _named(models, optimizers) if _has_memory(tensor)]
    return None if looks_finite([tensor for _, tensor in named]) else first_named(named)


def names_of(models: Mapping[str, nn.Module]) -> dict[int, str]:
    """The names of all parameters, by identity."""
    return {id(p): f"{name}.{key}" for name, model in models.items() for key, p in model.named_parameters()}


def looks_finite(tensors: Sequence[Tensor]) -> bool:
    """False when anything may be non-finite: one reduction for each device and type, and one value read."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        here = values_of(tensor).detach()
        if here.numel():
            kinds.setdefault((here.device, here.dtype), []).append(here)
    for (_, dtype), values in kinds.items():
        if dtype.itemsize == 1:  # torch (2.13) reduces no 8-bit floats
            return False
        if not bool(torch.stack(norms_of(values)).isfinite().all()):
            return False
    return True


def _has_memory(tensor: Tensor) -> bool:
    """False for a gathered FSDP weight that was put away again: reading its memory would end the process."""
    values = values_of(tensor)
    plain = type(values) in (Tensor, nn.Parameter) and values.layout is torch.strided
    return not plain or values.numel() == 0 or values.untyped_storage().nbytes() > 0


def _named(
    models: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]
) -> Iterator[tuple[str, Tensor]]:
    names = names_of(models)
    for optimizer_name, optimizer in optimizers.items():
        for index, group in enumerate(optimizer.param_groups):
            for position, parameter in enumerate(group["params"]):
                name = names.get(id(parameter), f"{optimizer_name}.groups[{index}].params[{position}]")
                yield name, parameter
                for key, value in optimizer.state.get(parameter, {}).items():
                    floating = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
                    if floating and value.numel() == parameter.numel():
                        yield f"{optimizer_name} {key} of {name}", value
