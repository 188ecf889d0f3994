"""Causal attention as transformers' models call it, without a mask: for traces of batches that have no values."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


def causal_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """(batch, heads, length, width) queries, keys and values to (batch, length, heads, width); nothing is masked but
    the future.

    To be registered as an attention function together with a mask function that returns ``None``. Fewer heads of keys
    and values are used as they are (``enable_gqa``), not repeated.
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    out = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=bool(causal) and query.shape[2] > 1 and attention_mask is None,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous(), None
