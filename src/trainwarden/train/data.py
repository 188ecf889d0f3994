"""The data of a run: where rows come from, which are kept for evaluation, and how they become batches."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainwarden.errors import InvalidSettingError, ResumeMismatchError
from trainwarden.runtime.unreadable import skip_unreadable
from trainwarden.train.docstrings import SOURCE_NAME, docstring_rows
from trainwarden.train.encode import IGNORED, Encoded
from trainwarden.train.jsonl import IN_MEMORY, read_jsonl, read_sequence
from trainwarden.train.rows import Row

Source = str | Path | Sequence[Any]
Batch = dict[str, Tensor]


def read_rows(source: Source, *, limit: int | None = None) -> list[Row]:
    """The rows of a JSONL file, of ``"python-docstrings"``, or of a sequence of mappings.

    Errors: see `read_jsonl`, `read_sequence` and `docstring_rows`.
    """
    if source == SOURCE_NAME:
        return list(docstring_rows(limit=limit))
    if isinstance(source, str | Path):
        return read_jsonl(source, limit=limit)
    return read_sequence(source, limit=limit)


def source_name(source: Source) -> str:
    """How messages call a source."""
    return str(source) if isinstance(source, str | Path) else IN_MEMORY


def split_rows(rows: list[Row], eval_rows: int, *, seed: int) -> tuple[list[Row], list[Row]]:
    """``(training rows, evaluation rows)``: ``eval_rows`` drawn by ``seed``, the order of the rest kept."""
    if eval_rows >= len(rows):
        raise InvalidSettingError(
            setting="eval_rows", value=eval_rows, expected=f"fewer than the {len(rows)} rows there are"
        )
    drawn = set(random.Random(seed).sample(range(len(rows)), eval_rows))
    kept = [row for index, row in enumerate(rows) if index not in drawn]
    return kept, [rows[index] for index in sorted(drawn)]


class EncodedDataset(Dataset[Encoded]):
    """A map-style data set over rows already encoded."""

    def __init__(self, rows: Sequence[Encoded]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Encoded:
        return self.rows[index]

    def sha256(self) -> str:
        """Identifies the tokens and labels, in their order: the same data under the same tokenizer."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(len(row.input_ids).to_bytes(8, "little"))
            digest.update(row.input_ids.tobytes())
            digest.update(row.labels.tobytes())
        return digest.hexdigest()


class DatasetIdentity:
    """Kept in each checkpoint, so that a run is not continued on other data without anybody noticing.

    ``accept_changes`` that name ``data`` allow it.
    """

    def __init__(self, dataset: EncodedDataset, *, accept_changes: Sequence[str]) -> None:
        self._state = {"rows": len(dataset), "sha256": dataset.sha256()}
        self._accepted = "data" in accept_changes

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises `ResumeMismatchError` for a checkpoint of other rows or another tokenizer."""
        if self._accepted or state == self._state:
            return
        raise ResumeMismatchError(
            differences={
                f"data.{key}": {"saved": state.get(key), "now": now}
                for key, now in self._state.items()
                if state.get(key) != now
            }
        )


def collate(rows: Sequence[Encoded], *, pad_token_id: int) -> Batch:
    """``input_ids``, ``attention_mask``, ``labels``: int64 (rows, longest row), padded on the right."""
    length = max(len(row.input_ids) for row in rows)
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.int64)
    labels = torch.full((len(rows), length), IGNORED, dtype=torch.int64)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.int64)
    for index, row in enumerate(rows):
        size = len(row.input_ids)
        input_ids[index, :size] = torch.frombuffer(row.input_ids, dtype=torch.int32)
        labels[index, :size] = torch.frombuffer(row.labels, dtype=torch.int32)
        attention_mask[index, :size] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def micro_batches(rows: Sequence[Encoded], *, micro_batch_size: int, pad_token_id: int) -> list[Batch]:
    """The rows of one optimizer step as batches of at most ``micro_batch_size``, each padded for itself."""
    return [
        collate(rows[start : start + micro_batch_size], pad_token_id=pad_token_id)
        for start in range(0, len(rows), micro_batch_size)
    ]


class StepCollator:
    """Collates the rows of one optimizer step into its micro-batches."""

    def __init__(self, *, micro_batch_size: int, pad_token_id: int) -> None:
        self.micro_batch_size = micro_batch_size
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[Encoded]) -> list[Batch]:
        return micro_batches(rows, micro_batch_size=self.micro_batch_size, pad_token_id=self.pad_token_id)


def training_loader(
    dataset: EncodedDataset, *, micro_batch_size: int, grad_accum_steps: int, pad_token_id: int, seed: int
) -> DataLoader[Encoded]:
    """A shuffled loader that yields, for each optimizer step, the list of its micro-batches.

    One item a step keeps the data position of a checkpoint whole, whatever the accumulation. The order comes
    from a generator of its own, seeded by ``seed``: neither dropout nor evaluation moves it. A row that cannot be
    read is left out of its step.
    """
    collator = StepCollator(micro_batch_size=micro_batch_size, pad_token_id=pad_token_id)
    return DataLoader(
        skip_unreadable(dataset),
        batch_size=micro_batch_size * grad_accum_steps,
        shuffle=True,
        collate_fn=collator,
        generator=torch.Generator().manual_seed(seed),
    )
