"""The loss of a causal language model without ever holding all its logits.

Logits and what their loss keeps take 12 bytes for each token and word of the vocabulary, often more than all else. Here
the output layer itself returns the loss: it goes through its input a chunk of tokens at a time, and each chunk's logits
are made once more in the backward pass (torch's checkpointing). The loss is the same mean, its gradients are the same
sums in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from trainwarden.errors import InvalidSettingError
from trainwarden.train.encode import IGNORED

Forward = Callable[[Tensor], Tensor]

TRIED_TOKENS = 8
TRIED_CHUNK = 3
TOLERANCE = 0.01
"""Relative difference between the chunked and the plain loss of `TRIED_TOKENS` tokens: bfloat16 needs a part of it,
anything between the output layer and the loss (a cap, a scale) exceeds it by far."""


def chunked_loss(model: nn.Module, batch: Mapping[str, Any], *, chunk_tokens: int) -> Tensor:
    """What ``model(**batch).loss`` would be: the mean cross entropy of the next token, in float32.

    Args:
        model: a causal language model of transformers, adapted by peft or prepared by accelerate or not.
        batch: ``input_ids``, ``attention_mask`` and ``labels``, int64 of shape (rows, tokens); -100 is no target.
        chunk_tokens: tokens whose logits are held at a time.

    Returns:
        A 0-d tensor; not a number where there is no target, as with the plain loss.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    targets = functional.pad(batch["labels"], (0, 1), value=IGNORED)[..., 1:].reshape(-1)

    def mean_of(hidden: Tensor, head: Forward) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        parts = zip(torch.split(flat, chunk_tokens), torch.split(targets, chunk_tokens), strict=True)
        sums = [checkpoint(_summed, head, part, labels, use_reentrant=False) for part, labels in parts]
        return torch.stack(sums).sum() / (targets != IGNORED).sum()

    with _head_returning(mean_of, output_layer(model)):
        loss: Tensor = model(**inputs, use_cache=False).logits
    return loss


def output_layer(model: nn.Module) -> nn.Module:
    """The layer that makes logits of hidden states. Raises InvalidSettingError for a model without one."""
    inner: Any = getattr(model, "module", model)
    find = getattr(inner, "get_output_embeddings", None)
    head = find() if find is not None else None
    if not isinstance(head, nn.Module):
        expected = f"null: {type(inner).__name__} names no output layer (get_output_embeddings)"
        raise InvalidSettingError(setting="loss_chunk_tokens", value=None, expected=expected)
    return head


@torch.no_grad()
def require_chunkable(model: nn.Module, device: torch.device) -> None:
    """Computes the loss of a few tokens both ways: they agree for a model whose output layer gives its logits.

    Raises InvalidSettingError for models that do something between output layer and loss (caps, scales, losses of
    experts): their loss cannot be made in chunks without knowing what.
    """
    inner: Any = getattr(model, "module", model)
    if getattr(inner.config, "output_router_logits", False):
        raise _refused(inner, "adds a loss of its experts (output_router_logits)")
    words = int(inner.get_input_embeddings().weight.shape[0])
    ids = (torch.arange(2 * TRIED_TOKENS, device=device) * 7 % words).reshape(2, TRIED_TOKENS)
    labels = ids.clone()
    labels[0, :3] = IGNORED
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    was_training = model.training
    model.eval()  # dropout would differ, and take random numbers of the run
    try:
        plain = float(model(**batch, use_cache=False).loss)
        chunked = float(chunked_loss(model, batch, chunk_tokens=TRIED_CHUNK))
    finally:
        model.train(was_training)
        getattr(model, "reshard", lambda: None)()  # FSDP keeps weights gathered after a forward pass alone
    if not abs(chunked - plain) <= TOLERANCE * abs(plain):
        raise _refused(inner, f"changes its logits before their loss ({chunked:.4g} in chunks, {plain:.4g} as it is)")


def _refused(model: nn.Module, what: str) -> InvalidSettingError:
    base: Any = getattr(model, "get_base_model", lambda: model)()
    expected = f"null with this model: {type(base).__name__} {what}"
    return InvalidSettingError(setting="loss_chunk_tokens", value="a number", expected=expected)


def _summed(head: Forward, hidden: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(head(hidden).float(), labels, ignore_index=IGNORED, reduction="sum")


@contextmanager
def _head_returning(mean_of: Callable[[Tensor, Forward], Tensor], head: nn.Module) -> Iterator[None]:
    """While this is open, ``head`` returns the mean loss of its input: within its hooks, which gather its weights."""
    forward = head.forward
    own = vars(head).get("forward")
    head.forward = lambda hidden: mean_of(hidden, forward)
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own
