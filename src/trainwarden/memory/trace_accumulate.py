"""Which sums of gradients autograd really makes in place.

Where a tensor is used twice, autograd adds its gradients, into the first of them if nobody else holds it. Under a
dispatch mode it never does, so a trace sees a third tensor that a real run does not have: for tied embeddings as large
as the vocabulary times the hidden size. Whether somebody else holds it is told by the reference counts, which are
compared with those of a sum that is known to be made in place.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

ADD = torch.ops.aten.add.Tensor

Counts = tuple[int, int]
"""References to a tensor and to its storage."""


def really_in_place(func: Any, args: Any, out: torch.Tensor) -> bool:
    """Whether this operator of the backward pass is a sum that a real run would make in its first argument."""
    if func is not ADD or torch.is_grad_enabled() or len(args) < 2 or not isinstance(args[1], torch.Tensor):
        return False
    first = args[0]
    alike = first.dtype is out.dtype and first.shape == out.shape
    return alike and _counts(first) == counts_when_sole()


def _counts(tensor: torch.Tensor) -> Counts | None:
    count = getattr(tensor, "_use_count", None)  # torch has it since 2.9; without it no sum is taken to be in place
    return None if count is None else (count(), torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


@cache
def counts_when_sole() -> Counts | None:
    """The counts that the first gradient has, inside a dispatch mode, when autograd alone holds it.

    To be called once outside of any dispatch, where autograd is at work.
    """
    seen: list[Counts | None] = []

    class Look(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is ADD:
                seen.append(_counts(args[0]))
            return func(*args, **(kwargs or {}))

    with torch.enable_grad(), FakeTensorMode(), Look():  # type: ignore[no-untyped-call]
        used_twice = torch.empty(2, requires_grad=True) * 2
        (used_twice.exp() * used_twice.sin()).sum().backward()  # type: ignore[no-untyped-call]
    return seen[0] if seen else (-1, -1)
