"""What elementwise kernels of the CPU allocate for themselves: operands of other types are copied into the common one.

CUDA's kernels convert each value when they read it, and need nothing. peft's adapters are in float32 beside a model in
bfloat16, so that each of their sums is such an operation.
"""

from __future__ import annotations

from typing import Any

import torch

_ATEN = torch.ops.aten
_ELEMENTWISE = frozenset(
    {
        _ATEN.add.Tensor,
        _ATEN.sub.Tensor,
        _ATEN.mul.Tensor,
        _ATEN.div.Tensor,
        _ATEN.maximum.default,
        _ATEN.minimum.default,
        _ATEN.addcmul.default,
        _ATEN.addcdiv.default,
        _ATEN.lerp.Scalar,
        _ATEN.lerp.Tensor,
    }
)


def copied_bytes(func: Any, args: Any, out: torch.Tensor) -> int:
    """Bytes of the copies that this operator makes of its operands on the CPU, for as long as it runs."""
    if func not in _ELEMENTWISE:
        return 0
    return sum(
        arg.numel() * out.dtype.itemsize
        for arg in args
        if isinstance(arg, torch.Tensor) and arg.dtype is not out.dtype and arg.ndim
    )
