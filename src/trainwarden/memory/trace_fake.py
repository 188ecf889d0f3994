"""Puts a model that was built on the meta device onto fake CPU tensors, and takes it off again.

The fake device is the CPU: on it attention keeps its flash-like kernel, whereas meta tensors decompose it (23 % too
much for a 0.5B model) and fake CUDA tensors need CUDA. Modules cannot be moved inside a fake mode, so each tensor is
replaced where it hangs; tensors that are tied stay tied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from trainwarden.memory.trace_values import keep_values


@contextmanager
def on_fake_cpu(model: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """While this is open, every parameter, buffer and tensor attribute of ``model`` is a fake CPU tensor."""
    twins: dict[int, torch.Tensor] = {}
    homes = [home for module in model.modules() for home in (module._parameters, module._buffers, module.__dict__)]
    before: list[dict[str, Any]] = [dict(home) for home in homes]
    try:
        for home in homes:
            for name, tensor in list(home.items()):
                if isinstance(tensor, torch.Tensor):
                    home[name] = fake_twin(tensor, mode, twins)  # type: ignore[assignment]
        yield
    finally:  # whole dictionaries: models keep tensors that they computed in a forward pass
        for home, contents in zip(homes, before, strict=True):
            home.clear()
            home.update(contents)


def fake_batch(batch: Any, mode: FakeTensorMode) -> Any:
    """``batch`` with every tensor replaced by a fake one; small whole-numbered ones keep their values beside it."""
    twins: dict[int, torch.Tensor] = {}

    def twin(tensor: torch.Tensor) -> torch.Tensor:
        fake = fake_twin(tensor, mode, twins)
        keep_values(fake, tensor)
        return fake

    return pytree.tree_map_only(torch.Tensor, twin, batch)


def fake_twin(tensor: torch.Tensor, mode: FakeTensorMode, twins: dict[int, torch.Tensor]) -> torch.Tensor:
    """A fake CPU tensor like ``tensor``, the same one for the same tensor."""
    if id(tensor) in twins:
        return twins[id(tensor)]
    with mode, torch.no_grad():
        fake: torch.Tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
    elif tensor.requires_grad:
        fake.requires_grad_()
    twins[id(tensor)] = fake
    return fake
