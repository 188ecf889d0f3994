"""The merge benchmark measures what it says, on a set of one layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import slao_merge
import torch


def test_the_set_is_that_of_a_7b_model() -> None:
    values = sum(value.numel() for value in slao_merge.adapter(0, torch.float32, layers=1).values())
    assert values * slao_merge.LAYERS == 39_976_960  # as peft counts for Llama-2-7B, rank 16, all linear layers


def test_each_input_is_read_once_and_the_result_written_once() -> None:
    one, half = ({"x": torch.zeros(10, dtype=dtype)} for dtype in (torch.float32, torch.bfloat16))
    assert slao_merge.touched_bytes(one, one) == 3 * 40
    assert slao_merge.touched_bytes(one, half) == 2 * 40 + 20


TIMES = {"old": [1.0, 2.0], "new": [3.0, 6.0], "float32 old": [2.0, 4.0], "float32 new": [3.0, 6.0]}


def test_the_share_is_that_of_the_bandwidth_of_a_copy_in_the_same_round() -> None:
    row = slao_merge._row("float32", "old", TIMES, need_bytes=300, copied_bytes=100)
    assert (row["share_of_old"], row["share_of_new"]) == (0.75, 2.25)
    assert row["share_of_old_range"] == [0.75, 0.75]


@pytest.mark.parametrize(
    ("memory", "need_bytes", "kept"), [("old", 200, True), ("old", 199, False), ("new", 100, True)]
)
def test_half_of_the_bandwidth_of_a_copy_into_the_same_kind_of_memory_is_required(
    memory: str, need_bytes: int, kept: bool
) -> None:
    assert slao_merge.holds(slao_merge._row("float32", memory, TIMES, need_bytes, 100)) is kept


def test_a_small_set_is_measured_and_its_table_made(tmp_path: Path) -> None:
    result = slao_merge.measure(0, rounds=2, layers=1)
    result["apart_s"] = slao_merge.apart(0, tmp_path / "merged", layers=1)
    assert [(row["adapter"], row["memory"]) for row in result["rows"]] == [
        ("float32", "old"),
        ("bfloat16", "old"),
        ("float32", "new"),
        ("bfloat16", "new"),
    ]
    assert all(row["share_of_old"] > 0 for row in result["rows"])
    assert len(result["apart_s"]) == 4
    assert slao_merge.table(result).count("\n|") >= 9
