"""Linear layers with 4-bit weights, as bitsandbytes' ``Linear4bit`` keeps them, for models that are only traced.

The real layer cannot be built without weights. This one has its tensors (half a byte a weight, one byte of scale for
64 weights, and with double quantisation a float32 scale for 256 of those, else four bytes each) and allocates as it
does: the whole weight in the compute type, for the time of the product, forward and again backward. Newer versions
have kernels that never hold the whole weight; then the prediction is too high by one layer's weight.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

BLOCK = 64
SCALES_BLOCK = 256


class PackedLinear(nn.Linear):
    """A linear layer with packed, frozen weights. Its output is a copy: peft clones that of a ``Linear4bit``."""

    def __init__(self, of: nn.Module, compute_dtype: torch.dtype, *, double_quant: bool) -> None:
        super().__init__(1, 1, bias=False, device="meta")
        self.out_features, self.in_features = _shape_of(of) or (1, 1)
        self.compute_dtype = compute_dtype
        elements = self.in_features * self.out_features
        packed = torch.empty((elements + 1) // 2, 1, dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        bias = of._parameters.get("bias")
        kept = None if bias is None else nn.Parameter(bias.to(compute_dtype), requires_grad=False)
        self.register_parameter("bias", kept)
        scales = -(-elements // BLOCK)
        self._hold("absmax", scales, torch.uint8 if double_quant else torch.float32)
        self._hold("code", 16)
        if double_quant:
            self._hold("absmax_scales", -(-scales // SCALES_BLOCK))
            self._hold("absmax_code", 256)
            self._hold("absmax_offset", 1)

    def _hold(self, name: str, elements: int, dtype: torch.dtype = torch.float32) -> None:
        self.register_buffer(name, torch.empty(elements, dtype=dtype, device="meta"), persistent=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(…, in_features) to (…, out_features), in the input's type."""
        shape = (self.out_features, self.in_features)
        out = _Product.apply(input.to(self.compute_dtype), self.weight, self.bias, shape)  # type: ignore[no-untyped-call]
        result: torch.Tensor = out.to(input.dtype)
        return result.clone()


class _Product(torch.autograd.Function):
    """Keeps the packed weight for the backward pass, not the input and not the whole weight."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, shape: tuple[int, int]
    ) -> torch.Tensor:
        ctx.shape = shape
        ctx.packed = packed
        whole = torch.empty(shape, dtype=input.dtype, device=input.device)
        return nn.functional.linear(input, whole, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,) = grads
        whole = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device)
        return torch.matmul(grad, whole), None, None, None


def _shape_of(module: nn.Module) -> tuple[int, int] | None:
    """``(out_features, in_features)`` of what bitsandbytes can pack: linear layers, and GPT-2's transposed ones."""
    if type(module) is nn.Linear:
        return module.out_features, module.in_features
    weight = module._parameters.get("weight")
    if type(module).__name__ == "Conv1D" and weight is not None and weight.ndim == 2:
        return weight.shape[1], weight.shape[0]
    return None


def pack_linears(
    model: nn.Module,
    *,
    compute_dtype: torch.dtype = torch.bfloat16,
    double_quant: bool = True,
    skip: Collection[str] = ("lm_head",),
) -> nn.Module:
    """Replaces every linear layer of a model on the meta device, and freezes what remains; returns the model.

    Layers whose last name is in ``skip`` stay as they are, as transformers leaves the head. To be called before
    peft's ``get_peft_model``, in place of loading with a quantisation config.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if _shape_of(child) is not None and name not in skip:
                setattr(module, name, PackedLinear(child, compute_dtype, double_quant=double_quant))
    return model
