"""Deep stacks of equal blocks, traced shallow: memory is linear in the number of blocks, moment by moment.

A stack is cut to a few blocks and traced at two depths. The moments that both have (before the stack, in its first two
and last two blocks, behind it) are extended to the full depth, each on its own line. What lies between is linear in
the block's position, so its maximum is at an end; the middle block of the deeper trace must confirm that, to the byte.
Only blocks of the same class, shapes, types and settings are taken for equal; a block may know its own number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

SHALLOW = 4
"""Blocks that are traced: two from each end. The second trace has one more."""
DEEP = 9
"""From this depth on two shallow traces are cheaper than a full one."""


@dataclass(frozen=True)
class Stack:
    """``container``, of the qualified name ``path``, has ``depth`` blocks; ``difference`` is empty if all are equal."""

    path: str
    container: nn.Module
    depth: int
    difference: str

    @property
    def units(self) -> tuple[str, ...]:
        """The qualified names of the blocks that are in the container now."""
        prefix = f"{self.path}." if self.path else ""
        return tuple(f"{prefix}{name}" for name in self.container._modules)


def find_stacks(model: nn.Module) -> tuple[Stack, ...]:
    """The outermost containers of at least two blocks of one class, in the order of the model."""
    found: list[Stack] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{stack.path}.") or not stack.path for stack in found)
        blocks = list(module.children())
        if inside or not isinstance(module, nn.ModuleList | nn.Sequential) or len(blocks) < 2:
            continue
        if len({type(block) for block in blocks}) == 1 and any(True for _ in blocks[0].parameters()):
            found.append(Stack(path, module, len(blocks), _difference(blocks)))
    return tuple(found)


@contextmanager
def cut(depths: Mapping[str, int], stacks: tuple[Stack, ...]) -> Iterator[None]:
    """While this is open, each stack holds only the first ``depths[path]`` of its blocks."""
    whole = {stack.path: dict(stack.container._modules) for stack in stacks}
    try:
        for stack in stacks:
            for name in list(stack.container._modules)[depths.get(stack.path, stack.depth) :]:
                del stack.container._modules[name]
        yield
    finally:
        for stack in stacks:
            stack.container._modules.clear()
            stack.container._modules.update(whole[stack.path])


def _difference(blocks: list[nn.Module]) -> str:
    """How the first block that differs from the first one does; empty if none does."""
    for number, block in enumerate(blocks[1:], start=1):
        for (name, one), (other_name, other) in zip(_parts(blocks[0]), _parts(block), strict=False):
            if name != other_name or type(one) is not type(other):
                return f"block {number} is built unlike block 0"
            if difference := _differing_setting(one, other, number):
                return f"block {number} differs from block 0 in {name + '.' if name else ''}{difference}"
        if len(_parts(block)) != len(_parts(blocks[0])):
            return f"block {number} is built unlike block 0"
    return ""


def _parts(block: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(block.named_modules())


def _differing_setting(one: nn.Module, other: nn.Module, number: int) -> str:
    for mine, theirs in ((one._parameters, other._parameters), (one._buffers, other._buffers)):
        if {k: _shape(v) for k, v in mine.items()} != {k: _shape(v) for k, v in theirs.items()}:
            return "shapes or types"
    for name, value in one.__dict__.items():
        if name.startswith("_") or not isinstance(value, bool | int | float | str | tuple | type(None)):
            continue
        theirs_value = other.__dict__.get(name)
        numbers_itself = type(value) is int and type(theirs_value) is int and theirs_value - value == number
        if theirs_value != value and not numbers_itself:
            return name
    return ""


def _shape(tensor: Any) -> Any:
    if not isinstance(tensor, torch.Tensor):
        return None
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad
