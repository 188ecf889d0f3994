"""Cutting batches of every ordinary shape, and refusing those that would be cut wrongly."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainwarden import target_tokens
from trainwarden.guards.oom import part_sizes
from trainwarden.runtime.split import CannotSplitError, ignored_target_place, rows, split_rows

Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Example:
    x: torch.Tensor
    name: str


X = torch.arange(10.0).reshape(5, 2)
Y = torch.arange(5)

BATCHES: dict[str, Any] = {
    "tensor": X,
    "tuple": (X, Y),
    "list": [X, Y],
    "dict": {"x": X, "y": Y, "scale": 0.5, "task": "cola", "none": None, "zero_d": torch.tensor(3.0)},
    "ordered dict": OrderedDict(x=X, y=Y),
    "user dict": UserDict({"x": X, "y": Y}),
    "named tuple": Pair(X, Y),
    "dataclass": Example(X, "a"),
    "nested": {"inputs": (X, {"deep": Y}), "texts": ["a", "b", "c", "d", "e"]},
}


@pytest.mark.parametrize("name", BATCHES)
@given(limit=st.integers(1, 6))
def test_parts_keep_type_and_order_and_make_up_the_batch(name: str, limit: int) -> None:
    batch = BATCHES[name]
    sizes = part_sizes(5, limit)
    parts = split_rows(batch, sizes)
    assert [rows(part) for part in parts] == list(sizes)
    assert all(type(part) is type(batch) for part in parts)
    assert torch.equal(torch.cat([_first_tensor(part) for part in parts]), X)


def _first_tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    if hasattr(value, "items"):
        return _first_tensor(next(iter(value.values())))
    return _first_tensor(value.x if isinstance(value, Example) else value[0])


def test_what_has_no_rows_goes_to_every_part() -> None:
    for part in split_rows(BATCHES["dict"], [3, 2]):
        assert (part["scale"], part["task"], part["none"], float(part["zero_d"])) == (0.5, "cola", None, 3.0)


def test_a_list_with_one_item_a_row_is_cut_with_the_rows() -> None:
    texts = [part["texts"] for part in split_rows(BATCHES["nested"], [2, 3])]
    assert texts == [["a", "b"], ["c", "d", "e"]]


def test_parts_are_views() -> None:
    (first, _) = split_rows(X, [2, 3])
    assert first.data_ptr() == X.data_ptr()


def test_a_hugging_face_batch_encoding_is_cut() -> None:
    from transformers import BatchEncoding

    encoding = BatchEncoding({"input_ids": torch.ones(4, 3), "labels": torch.ones(4, 3)})
    parts = split_rows(encoding, [2, 2])
    assert [rows(part) for part in parts] == [2, 2]


def test_tensors_that_disagree_about_the_rows_are_refused_by_name() -> None:
    with pytest.raises(CannotSplitError, match=r"\['cu_seqlens'\] has 4"):
        rows({"tokens": torch.ones(1, 100), "cu_seqlens": torch.ones(4)})


@pytest.mark.parametrize("batch", ["text", 3, None, {"a": 1}, torch.tensor(1.0)])
def test_a_batch_without_rows_is_refused(batch: Any) -> None:
    with pytest.raises(CannotSplitError):
        rows(batch)


def test_ignored_targets_are_found_wherever_they_are() -> None:
    assert ignored_target_place({"labels": torch.tensor([[1, -100]])}) == "batch['labels']"
    assert ignored_target_place((X, torch.tensor([[1, -100]]))) == "batch[1]"
    assert ignored_target_place({"labels": torch.tensor([[1, 2]]), "x": torch.tensor([-100.0])}) is None
    assert ignored_target_place(torch.tensor([156], dtype=torch.uint8)) is None


def test_target_tokens_counts_the_last_tensor_of_a_tuple() -> None:
    assert target_tokens((X, torch.tensor([[1, -100], [2, 3]]))) == 3


@pytest.mark.parametrize("batch", [{"targets": Y}, (1, 2), X])
def test_target_tokens_says_what_it_needs(batch: Any) -> None:
    with pytest.raises(CannotSplitError, match="labels"):
        target_tokens(batch)
