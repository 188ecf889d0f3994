"""What it takes to repeat a forward and backward pass of models that FSDP2 has sharded, where one process can.

FSDP keeps track of a pass while it runs. A pass that runs out of memory leaves that undone: the next one would find
layers gathered that it takes for its own, never finish its reductions, and train something else without a word.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainwarden.runtime.sharded import is_sharded, local

ComputeLoss = Callable[[Any], Tensor]


class ShardedPasses:
    """The outermost FSDP2 modules of ``models``, brought to rest before each pass. Without any, nothing is done."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self._roots = [root for model in models for root in _outermost(model)]

    @property
    def present(self) -> bool:
        """Whether any model is sharded."""
        return bool(self._roots)

    @property
    def can_repeat(self) -> bool:
        """Whether a pass that failed can be repeated: FSDP can be brought to rest, which torch can since 2.13."""
        return all(hasattr(root, "reset_iter_state") for root in self._roots)

    def from_rest(self, compute_loss: ComputeLoss) -> ComputeLoss:
        """``compute_loss`` after whatever a pass before it has left behind was cleared away."""
        if not self._roots or not self.can_repeat:
            return compute_loss

        def settled(batch: Any) -> Tensor:
            self.settle()
            return compute_loss(batch)

        return settled

    def settle(self) -> None:
        """Drops what a failed pass has left behind; without effect after one that was completed."""
        for root in self._roots:
            for parameter in root.parameters():
                if not is_sharded(parameter):  # gathered; what its gradient holds came from the pass that failed,
                    parameter.grad = None  # and FSDP's own reset leaves it there (torch 2.13)
            if _has_run(root):
                root.reset_iter_state()

    @contextmanager
    def gradients_set_aside(self, leaves: Iterable[Tensor]) -> Iterator[None]:
        """Takes the gradients there are off the leaves, and adds what has come meanwhile to them at the end.

        FSDP adds to a piece of a gradient unseen by its version counter, and a backward pass over gathered weights
        cannot be limited to pieces of them. So each pass begins without gradients and is repeated as a whole. One that
        ends in an error leaves the gradients that were there before it.
        """
        earlier = [(leaf, leaf.grad) for leaf in leaves if leaf.grad is not None] if self._roots else []
        for leaf, _ in earlier:
            leaf.grad = None
        try:
            yield
        except BaseException:
            for leaf, gradient in earlier:
                leaf.grad = gradient
            raise
        for leaf, gradient in earlier:
            if leaf.grad is not None:
                with torch.no_grad():
                    local(gradient).add_(local(leaf.grad))
            leaf.grad = gradient


def _outermost(module: nn.Module) -> Iterator[Any]:
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # a module can only be sharded if the process imported it
    if fsdp is None or not hasattr(fsdp, "FSDPModule"):
        return
    if isinstance(module, fsdp.FSDPModule):
        yield module
        return
    for child in module.children():
        yield from _outermost(child)


def _has_run(root: Any) -> bool:
    """Before its first pass there is nothing to reset, and FSDP cannot yet."""
    return getattr(root._get_fsdp_state(), "_is_root", True) is not None
