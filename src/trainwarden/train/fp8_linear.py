"""A linear layer of torchao that computes in FP8 and is frozen. Imports torchao: only `train.fp8` may import this."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args


class FrozenFloat8Linear(Float8Linear):  # type: ignore[misc]  # torchao ships no types
    """Torchao's layer without the gradient of its weight, which nobody asks for.

    Torchao computes that gradient in every backward pass: a third matrix product beside the two that are needed, for
    which the layer's input must be kept, and whose inner dimension is the number of tokens, where FP8 takes multiples
    of 16 only.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (…, in_features). Returns (…, out_features) in the type of autocast, else in that of ``x``."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        product: Tensor = _FrozenProduct.apply(x, self.weight, self.linear_mm_config, self.config)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias.to(product.dtype)


class _FrozenProduct(torch.autograd.Function):
    """``x @ weight.t()``, and the gradient of ``x`` alone, both products cast as ``config`` says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, products: Any, config: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.products, ctx.config = products, config
        product: Tensor = matmul_with_hp_or_float8_args.apply(x, weight.t(), products, config)
        return product

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), (gradient,) = ctx.saved_tensors, gradients
        # The first operand counts as an input there; its product is to be accumulated as torchao does a gradient's.
        products = ctx.products._replace(output=ctx.products.grad_input)
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_x: Tensor = matmul_with_hp_or_float8_args.apply(rows, weight, products, ctx.config)
        return of_x.reshape(*gradient.shape[:-1], -1), None, None, None
