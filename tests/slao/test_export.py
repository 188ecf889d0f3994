"""The exported adapter follows the newest snapshot, and is never a mixture of two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from trainwarden import slao
from trainwarden.slao import export

from .adapters import adapter, fingerprint, same, store_with

WEIGHTS, CONFIG, MARKER = "adapter_model.safetensors", "adapter_config.json", "trainwarden.json"


def test_the_marker_names_the_snapshot_and_its_files(tmp_path: Path) -> None:
    store = store_with(tmp_path / "m", 1, 2)
    marker = json.loads((store.path / MARKER).read_text())
    assert (marker["kind"], marker["snapshot"], marker["index"]) == ("slao", 2, 2)
    assert set(marker["files"]) == {WEIGHTS, CONFIG}
    assert store.exported_sequence == 2


def test_the_exported_adapter_is_itself_an_adapter(tmp_path: Path) -> None:
    store = store_with(tmp_path / "m", 1, 2)
    current = store.current()
    assert current is not None
    assert same(slao.read_adapter(store.path).tensors, current.exported())


def test_a_commit_may_leave_the_export_to_a_later_one(tmp_path: Path) -> None:
    store = store_with(tmp_path / "m", 1)
    store.commit(slao.propose(store, adapter(2)), exported=False)
    assert store.exported_sequence == 1
    assert store.export()
    assert store.exported_sequence == 2
    current = store.current()
    assert current is not None
    assert same(load_file(store.path / WEIGHTS), current.exported())
    assert not store.export()  # nothing left to do


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_file_that_was_removed_is_put_back(tmp_path: Path, name: str) -> None:
    store = store_with(tmp_path / "m", 1)
    before = fingerprint(store.path)[name][1]
    (store.path / name).unlink()
    assert store.exported_sequence is None
    assert store.export()
    assert fingerprint(store.path)[name][1] == before


def test_weights_never_stand_beside_a_configuration_that_is_not_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new chain with another rank into an old output: killed anywhere, both files fit or one is gone."""
    store = store_with(tmp_path / "m", 1)
    seen = []
    real = export.replace_file

    def look(path: Path, pieces: object) -> object:
        done = real(path, pieces)  # type: ignore[arg-type]
        directory = path.parent
        if (directory / WEIGHTS).exists() and (directory / CONFIG).exists():
            rank = json.loads((directory / CONFIG).read_text())["r"]
            key = next(key for key in load_file(directory / WEIGHTS) if "lora_A" in key)
            seen.append((rank, load_file(directory / WEIGHTS)[key].shape[0]))
        return done

    monkeypatch.setattr(export, "replace_file", look)
    head = store.current()
    from trainwarden.slao.transaction import propose_first

    store.commit(propose_first(adapter(2, rank=5), after=head))
    assert seen
    assert {rank == found for rank, found in seen} == {True}
    assert seen[-1] == (5, 5)


def test_ours_is_what_the_marker_says(tmp_path: Path) -> None:
    store = store_with(tmp_path / "m", 1)
    assert export.is_ours(store.path)
    (store.path / MARKER).write_text(json.dumps({"files": {}, "base_model": "x"}))  # as a Trainer publishes a model
    assert not export.is_ours(store.path)
    assert export.exported_sequence(store.path) is None
