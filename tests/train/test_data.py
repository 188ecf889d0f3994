"""Data sets, batches and the loader: no row is lost or trained twice in an epoch, and the order is the seed's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.train.tiny import instructions, write_jsonl
from trainwarden.errors import InvalidSettingError, ResumeMismatchError
from trainwarden.train.data import (
    DatasetIdentity,
    EncodedDataset,
    collate,
    micro_batches,
    read_rows,
    split_rows,
    training_loader,
)
from trainwarden.train.encode import IGNORED, Encoded
from trainwarden.train.rows import Text

ROWS = st.lists(
    st.lists(st.integers(0, 99), min_size=1, max_size=9).map(lambda ids: Encoded.of(ids, ids)), min_size=1, max_size=9
)


def numbered(count: int) -> EncodedDataset:
    return EncodedDataset([Encoded.of([i] * (1 + i % 5), [i] * (1 + i % 5)) for i in range(count)])


def firsts(batches: list[dict[str, Any]]) -> list[int]:
    return [int(row[0]) for batch in batches for row in batch["input_ids"]]


@given(ROWS)
def test_a_batch_holds_each_row_and_pads_the_rest(rows: list[Encoded]) -> None:
    batch = collate(rows, pad_token_id=77)
    longest = max(len(row.input_ids) for row in rows)
    assert all(tensor.shape == (len(rows), longest) and tensor.dtype == torch.int64 for tensor in batch.values())
    for index, row in enumerate(rows):
        size = len(row.input_ids)
        assert batch["input_ids"][index].tolist() == [*row.input_ids, *[77] * (longest - size)]
        assert batch["labels"][index].tolist() == [*row.labels, *[IGNORED] * (longest - size)]
        assert batch["attention_mask"][index].tolist() == [1] * size + [0] * (longest - size)


@given(ROWS, st.integers(1, 10))
def test_micro_batches_hold_all_rows_in_order(rows: list[Encoded], size: int) -> None:
    batches = micro_batches(rows, micro_batch_size=size, pad_token_id=0)
    assert firsts(batches) == [row.input_ids[0] for row in rows]
    assert all(len(batch["labels"]) <= size for batch in batches)
    assert len(batches) == math.ceil(len(rows) / size)


def test_an_epoch_holds_every_row_once_and_a_step_all_its_micro_batches() -> None:
    loader = training_loader(numbered(20), micro_batch_size=3, grad_accum_steps=2, pad_token_id=0, seed=1)
    steps = list(loader)
    assert [len(step) for step in steps] == [2, 2, 2, 1]
    assert sorted(first for step in steps for first in firsts(step)) == list(range(20))


def test_the_order_is_the_seeds_and_the_global_generator_has_no_part_in_it() -> None:
    def order(seed: int) -> list[int]:
        torch.manual_seed(torch.seed() % 1000)
        loader = training_loader(numbered(20), micro_batch_size=4, grad_accum_steps=1, pad_token_id=0, seed=seed)
        return [first for step in loader for first in firsts(step)]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_the_loader_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    list(training_loader(numbered(20), micro_batch_size=4, grad_accum_steps=1, pad_token_id=0, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_rows_are_drawn_by_the_seed_and_are_not_trained_on() -> None:
    rows: list[Any] = [Text(str(i)) for i in range(50)]
    kept, drawn = split_rows(rows, 10, seed=4)
    assert len(drawn) == 10
    assert sorted(int(row.text) for row in [*kept, *drawn]) == list(range(50))  # type: ignore[union-attr]
    assert (kept, drawn) == split_rows(rows, 10, seed=4)
    assert drawn != split_rows(rows, 10, seed=5)[1]
    assert kept == [row for row in rows if row not in drawn]


@pytest.mark.parametrize("count", [3, 4])
def test_some_rows_must_be_left_for_training(count: int) -> None:
    with pytest.raises(InvalidSettingError, match="eval_rows"):
        split_rows([Text("a"), Text("b"), Text("c")], count, seed=0)


def test_identity_tells_tokens_labels_and_order_apart() -> None:
    a, b = Encoded.of([1, 2], [1, 2]), Encoded.of([3], [3])
    same = EncodedDataset([Encoded.of([1, 2], [1, 2]), b])
    assert EncodedDataset([a, b]).sha256() == same.sha256()
    others = [[b, a], [a], [Encoded.of([1, 2], [IGNORED, 2]), b], [Encoded.of([1], [1]), Encoded.of([2, 3], [2, 3])]]
    assert all(EncodedDataset(rows).sha256() != same.sha256() for rows in others)


def test_a_checkpoint_of_other_data_is_refused_unless_accepted() -> None:
    saved = DatasetIdentity(numbered(5), accept_changes=()).state_dict()
    DatasetIdentity(numbered(5), accept_changes=()).load_state_dict(saved)
    with pytest.raises(ResumeMismatchError) as caught:
        DatasetIdentity(numbered(6), accept_changes=()).load_state_dict(saved)
    assert caught.value.details["differences"]["data.rows"] == {"saved": 5, "now": 6}
    DatasetIdentity(numbered(6), accept_changes=["data"]).load_state_dict(saved)


def test_a_source_is_a_file_a_sequence_or_the_built_in_one(tmp_path: Path) -> None:
    rows = instructions(4)
    assert read_rows(write_jsonl(tmp_path / "a.jsonl", rows)) == read_rows(rows)
    assert len(read_rows("python-docstrings", limit=3)) == 3
