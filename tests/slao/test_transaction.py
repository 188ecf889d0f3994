"""Proposals: what a campaign works with. They touch nothing until they are committed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainwarden import slao
from trainwarden.errors import CheckpointError, SLAOMergeError

from .adapters import adapter, fingerprint, same, saved, state, store_with


def test_a_gate_can_look_at_a_merge_before_it_is_committed(tmp_path: Path) -> None:
    store = store_with(tmp_path / "m", 1)
    rejected, accepted = slao.propose(store, adapter(2)), slao.propose(store, adapter(3))
    snapshot = store.commit(accepted)  # the first one is dropped
    assert same(snapshot.merged, accepted.merged)
    assert not same(snapshot.merged, rejected.merged)
    assert [record.source for record in store.history()] == ["task-1", "task-3"]


def test_a_directory_and_an_adapter_are_proposed_alike(tmp_path: Path) -> None:
    store = store_with(tmp_path / "m", 1)
    path = saved(tmp_path / "task-2", state(2))
    one, two = slao.propose(store, path), slao.propose(store, str(path), source="second")
    assert same(one.merged, slao.propose(store, adapter(2)).merged)
    assert (one.record.source, two.record.source) == (str(path), "second")


def test_the_source_may_be_named_otherwise(tmp_path: Path) -> None:
    store = slao.SlaoStore(tmp_path / "m")
    assert slao.merge_trained(store, adapter(1), source="monday").history[-1].source == "monday"


def test_a_start_that_was_taken_is_a_recorded_lineage(tmp_path: Path) -> None:
    store = store_with(tmp_path / "m", 1)
    right = slao.Start(index=2, started_from=adapter(1).digest())
    assert slao.propose(store, adapter(2), start=right).record.recorded_lineage
    wrong = slao.propose(store, adapter(2), start=slao.Start(index=2, started_from="another"))
    assert not wrong.record.recorded_lineage
    assert "says that it was started from another adapter" in wrong.notes[0]
    silent = slao.propose(store, adapter(2))
    assert "has no recorded lineage" in silent.notes[0]
    assert set(silent.overlaps) == {key for key in state() if "lora_A" in key}
    assert silent.record.overlap == pytest.approx(sum(silent.overlaps.values()) / len(silent.overlaps))


def test_the_lineage_file_is_what_a_start_says(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", state(1))
    slao.record_lineage(path, None)  # the first task has none
    assert not (path / "slao_lineage.json").exists()
    for digest in ("one", "two"):
        slao.record_lineage(path, slao.Start(index=2, started_from=digest))
        assert slao.read_adapter(path).started_from == digest
    assert json.loads((path / "slao_lineage.json").read_text())["index"] == 2
    assert sorted(file.name for file in path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "slao_lineage.json",
    ]


def test_a_lineage_needs_a_directory_to_stand_in(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file or directory"):
        slao.record_lineage(tmp_path / "missing", slao.Start(2, "x"))


def test_an_adapter_made_in_memory_is_checked_as_well(tmp_path: Path) -> None:
    store = slao.SlaoStore(tmp_path / "m")
    with pytest.raises(SLAOMergeError, match="only LORA can be merged"):
        slao.propose(store, slao.Adapter(state(1), {"peft_type": "LOHA"}, "x"))
    with pytest.raises(SLAOMergeError, match="its configuration says 8"):
        slao.propose(store, slao.Adapter(state(1), {"peft_type": "LORA", "r": 8}, "x"))
    assert not (tmp_path / "m").exists()


def test_another_dtype_than_the_lineage_has_is_refused(tmp_path: Path) -> None:
    import torch

    store = store_with(tmp_path / "m", 1)
    before = fingerprint(store.path)
    with pytest.raises(SLAOMergeError, match="is bfloat16, and the accumulator's float32"):
        slao.merge_trained(store, adapter(2, dtype=torch.bfloat16))
    assert fingerprint(store.path) == before
