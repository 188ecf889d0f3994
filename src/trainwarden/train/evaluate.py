"""The loss on rows that are not trained on. It changes nothing: no gradient, no random number, no mode."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from trainwarden.errors import GPUMemoryError
from trainwarden.guards.oom import MemoryFailure, is_out_of_memory
from trainwarden.runtime.split import shifted_target_tokens
from trainwarden.train.data import Batch, collate
from trainwarden.train.encode import Encoded


def mean_loss(
    loss_of: Callable[[Batch], Tensor],
    model: nn.Module,
    rows: Sequence[Encoded],
    *,
    batch_size: int,
    pad_token_id: int,
    shrink: Callable[[int, int], None] | None,
) -> float:
    """The mean over all target tokens of ``rows``; reads one value from the device at the end.

    ``loss_of(batch)`` is the mean over the targets of a batch. When memory runs out the batch is halved,
    ``shrink`` is told ``(from, to)``, and the same rows are taken again; without ``shrink``, and for a single
    row, that is a `GPUMemoryError`.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _mean_loss(loss_of, rows, batch_size, pad_token_id, shrink)
    finally:
        model.train(was_training)


def _mean_loss(
    loss_of: Callable[[Batch], Tensor],
    rows: Sequence[Encoded],
    batch_size: int,
    pad_token_id: int,
    shrink: Callable[[int, int], None] | None,
) -> float:
    sums: list[Tensor] = []
    targets = 0.0
    start = 0
    while start < len(rows):
        batch = collate(rows[start : start + batch_size], pad_token_id=pad_token_id)
        weight = shifted_target_tokens(batch)
        loss, failure = _attempt(loss_of, batch)
        if loss is None:
            assert failure is not None
            batch_size = _halved(batch_size, failure, shrink)
            continue
        sums.append(loss.double() * weight)
        targets += weight
        start += batch_size
    return float(torch.stack(sums).sum()) / targets


def _attempt(loss_of: Callable[[Batch], Tensor], batch: Batch) -> tuple[Tensor | None, MemoryFailure | None]:
    try:
        return loss_of(batch), None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None, MemoryFailure.from_exception(error)


def _halved(batch_size: int, failure: MemoryFailure, shrink: Callable[[int, int], None] | None) -> int:
    if batch_size == 1 or shrink is None:
        raise GPUMemoryError(
            phase="evaluation",
            micro_batch_size=batch_size,
            shrinks=0,
            requested_bytes=failure.requested_bytes,
            free_bytes=failure.free_bytes,
            problem=failure.text,
        )
    smaller = -(-batch_size // 2)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    shrink(batch_size, smaller)
    return smaller
