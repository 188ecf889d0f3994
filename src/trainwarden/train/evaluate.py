"""Rows that are not trained on, as the batches of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trainwarden.train.data import Batch, collate
from trainwarden.train.encode import Encoded


def evaluation_batches(rows: Sequence[Encoded], *, batch_size: int, pad_token_id: int) -> Iterator[Batch]:
    """``rows`` in order, ``batch_size`` at a time, padded to the longest of each batch."""
    for start in range(0, len(rows), batch_size):
        yield collate(rows[start : start + batch_size], pad_token_id=pad_token_id)
