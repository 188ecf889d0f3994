"""The accumulator on disk: every merge is a snapshot, none is changed, and any that is kept can be gone back to."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.faults import in_child
from trainwarden import slao
from trainwarden.checkpoint import CheckpointStore
from trainwarden.errors import (
    AdapterNotFoundError,
    DiskFullError,
    InvalidSettingError,
    RunLockedError,
    SLAOCheckpointError,
    SLAOError,
    SLAOMergeDivergedError,
)
from trainwarden.runs.lock import DirectoryLock

from . import reference
from .adapters import CONFIG, adapter, fingerprint, same, saved, state, store_with


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x10
    path.write_bytes(content)


def snapshot_file(store: slao.SlaoStore, sequence: int) -> Path:
    return store.path / "snapshots" / f"step-{sequence:08d}" / "merged.safetensors"


def test_a_new_store_touches_nothing(tmp_path: Path) -> None:
    store = slao.SlaoStore(tmp_path / "m")
    assert store.current() is None
    assert not store.exists()
    assert store.exported_sequence is None
    assert not store.export()
    assert list(tmp_path.iterdir()) == []


def test_what_was_committed_is_what_a_new_process_reads(tmp_path: Path) -> None:
    written = [slao.merge_trained(slao.SlaoStore(tmp_path / "m"), adapter(seed)) for seed in (1, 2, 3)]
    read = slao.SlaoStore(tmp_path / "m").current()
    assert read is not None
    assert (read.sequence, read.index) == (3, 3)
    assert same(read.merged, written[-1].merged)
    assert same(read.finetuned, state(3))
    expected = reference.merged(reference.arrays(state(seed)) for seed in (1, 2, 3))
    assert reference.distance(read.merged, expected) < 1e-6
    assert read.config == {**CONFIG, "use_dora": False}
    assert read.history == written[-1].history


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_adapters_are_accumulated_in_float32_and_exported_in_theirs(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    store = store_with(tmp_path / "m", 1, 2, 3, dtype=dtype)
    snapshot = store.current()
    assert snapshot is not None
    assert {value.dtype for value in snapshot.merged.values()} == {torch.float32}
    assert same(snapshot.finetuned, state(3, dtype=dtype))
    exported = load_file(tmp_path / "m" / "adapter_model.safetensors")
    assert same(exported, {key: value.to(dtype) for key, value in snapshot.merged.items()})


def test_the_history_says_what_was_merged_how(tmp_path: Path) -> None:
    store = store_with(tmp_path / "m", 1, 2)
    slao.merge_trained(store, adapter(3), slao.MergePolicy(mode="average", schedule="inverse"))
    records = store.history()
    assert [(r.sequence, r.action, r.index, r.source, r.mode, r.kept) for r in records] == [
        (1, "start", 1, "task-1", "slao", "kept"),
        (2, "merge", 2, "task-2", "slao", "kept"),
        (3, "merge", 3, "task-3", "average", "current"),
    ]
    assert [r.weight for r in records] == pytest.approx([1, 2**-0.5, 1 / 3])
    assert records[1].norms["before"] == pytest.approx(records[0].norms["after"])
    assert records[2].digest == adapter(3).digest()
    assert json.loads(json.dumps([r.to_json() for r in records]))


def test_a_rollback_is_a_new_snapshot_and_can_be_rolled_back(tmp_path: Path) -> None:
    store = store_with(tmp_path / "m", 1, 2, 3)
    second, third = store.at(2), store.at(3)
    back = store.rollback(2)
    assert (back.sequence, back.index) == (4, 2)
    assert same(back.merged, second.merged)
    assert same(back.finetuned, state(2))
    assert same(load_file(tmp_path / "m" / "adapter_model.safetensors"), second.exported())
    slao.merge_trained(store, adapter(7))
    assert [(r.action, r.index) for r in store.history()][2:] == [("merge", 3), ("rollback", 2), ("merge", 3)]
    forward = store.rollback(3)
    assert same(forward.merged, third.merged)
    assert store.history()[-1].source == "snapshot 3"


def test_old_snapshots_are_retired_and_their_records_stay(tmp_path: Path) -> None:
    store = slao.SlaoStore(tmp_path / "m", keep_last=2)
    for seed in range(4):
        slao.merge_trained(store, adapter(seed))
    assert [r.kept for r in store.history()] == ["retired", "retired", "kept", "current"]
    with pytest.raises(SLAOCheckpointError, match="it was retired"):
        store.rollback(1)
    assert store.rollback(3).index == 3


@pytest.mark.parametrize("to", [0, 9, -1])
def test_a_number_that_never_was_cannot_be_gone_back_to(tmp_path: Path, to: int) -> None:
    store = store_with(tmp_path / "m", 1)
    before = fingerprint(tmp_path / "m" / "snapshots")
    with pytest.raises(SLAOCheckpointError, match="there is no snapshot of that number"):
        store.rollback(to)
    assert fingerprint(tmp_path / "m" / "snapshots") == before


def test_a_damaged_newest_snapshot_is_announced_and_the_one_before_is_gone_on_from(tmp_path: Path) -> None:
    store = store_with(tmp_path / "m", 1, 2, 3)
    flip(snapshot_file(store, 3))
    with pytest.warns(UserWarning, match=r"step-00000003 is damaged and was passed over: .*SHA-256"):
        current = store.current()
    assert current is not None
    assert current.sequence == 2
    rejected: list[str] = []
    quiet = slao.SlaoStore(tmp_path / "m", on_rejected=lambda path, reason: rejected.append(path.name))
    assert slao.merge_trained(quiet, adapter(4)).sequence == 4  # a number is never used twice
    assert set(rejected) == {"step-00000003"}


def test_a_damaged_older_snapshot_is_shown_and_not_gone_back_to(tmp_path: Path) -> None:
    store = store_with(tmp_path / "m", 1, 2, 3)
    flip(snapshot_file(store, 2))
    assert [r.kept for r in store.history()] == ["kept", "damaged", "current"]
    with pytest.raises(SLAOCheckpointError, match="SHA-256"):
        store.rollback(2)


def test_with_every_snapshot_damaged_nothing_is_made_up(tmp_path: Path) -> None:
    store = store_with(tmp_path / "m", 1, 2)
    for sequence in (1, 2):
        flip(snapshot_file(store, sequence))
    before = fingerprint(store.path / "snapshots")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(SLAOCheckpointError, match="none is valid"):
            slao.merge_trained(store, adapter(3))
    assert fingerprint(store.path / "snapshots") == before


def test_a_checkpoint_of_something_else_is_no_snapshot(tmp_path: Path) -> None:
    store = store_with(tmp_path / "m", 1)
    CheckpointStore(store.path / "snapshots").save(2, {"model": {"weight": torch.ones(2)}}, {"step": 2})
    with pytest.raises(SLAOCheckpointError, match="not a snapshot of this format"):
        store.current()


def test_a_snapshot_whose_entries_make_no_sense_is_refused(tmp_path: Path) -> None:
    store = store_with(tmp_path / "m", 1)
    CheckpointStore(store.path / "snapshots").save(2, {"merged": {}}, {"kind": "slao", "format_version": 1})
    with pytest.raises(SLAOCheckpointError, match="make no sense"):
        store.current()


def test_a_merge_from_an_accumulator_that_has_moved_on_is_not_committed(tmp_path: Path) -> None:
    store = store_with(tmp_path / "m", 1)
    proposal = slao.propose(store, adapter(2))
    slao.merge_trained(store, adapter(3))
    before = fingerprint(store.path / "snapshots")
    with pytest.raises(SLAOError, match="snapshot 2 was committed meanwhile, and this merge started from 1"):
        store.commit(proposal)
    assert fingerprint(store.path / "snapshots") == before


def test_a_proposal_that_is_dropped_has_touched_nothing(tmp_path: Path) -> None:
    store = store_with(tmp_path / "m", 1)
    before = fingerprint(store.path)
    slao.propose(store, adapter(2))
    assert fingerprint(store.path) == before
    slao.propose(slao.SlaoStore(tmp_path / "new"), adapter(2))
    assert not (tmp_path / "new").exists()


def test_a_merge_that_diverges_leaves_the_accumulator_and_names_the_last_good_snapshot(tmp_path: Path) -> None:
    store = store_with(tmp_path / "m", 1, 2)
    bad = adapter(3)
    next(iter(bad.tensors.values()))[0, 0] = float("nan")
    before = fingerprint(store.path)
    with pytest.raises(SLAOMergeDivergedError) as raised:
        slao.merge_trained(store, bad)
    assert fingerprint(store.path) == before
    assert raised.value.run_index == 3
    assert raised.value.checkpoint_path == str(store.path / "snapshots" / "step-00000002")
    assert raised.value.exit_code == 80
    assert raised.value.to_dict()["details"]["norms"]["incoming"] == "nan"


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    store = store_with(tmp_path / "m", 1)
    lock = DirectoryLock(store.path / ".lock")
    with pytest.raises(RunLockedError):
        slao.merge_trained(store, adapter(2))
    assert slao.SlaoStore(store.path).current() is not None  # readers may come at any time
    lock.close()
    assert slao.merge_trained(store, adapter(2)).index == 2


def test_a_killed_writer_leaves_no_lock_behind(tmp_path: Path) -> None:
    store = store_with(tmp_path / "m", 1)

    def die() -> None:
        with store.writing():
            import os
            import signal

            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die) == -9
    assert slao.merge_trained(store, adapter(2)).index == 2


@pytest.mark.parametrize("content", ["user.txt", "adapter_model.safetensors"])
def test_a_directory_with_something_else_in_it_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / content).write_text("mine")
    with pytest.raises(InvalidSettingError, match="a new directory, or one that an earlier merge wrote"):
        slao.merge_trained(slao.SlaoStore(tmp_path / "m"), adapter(1))
    assert [path.name for path in (tmp_path / "m").iterdir()] == [content]


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("mine")
    with pytest.raises(InvalidSettingError):
        slao.merge_trained(slao.SlaoStore(tmp_path / "m"), adapter(1))


def test_what_a_user_adds_to_the_directory_stays(tmp_path: Path) -> None:
    store = store_with(tmp_path / "m", 1)
    (store.path / "README.md").write_text("mine")
    (store.path / "snapshots" / "notes.txt").write_text("mine too")
    slao.merge_trained(store, adapter(2))
    assert (store.path / "README.md").read_text() == "mine"
    assert (store.path / "snapshots" / "notes.txt").read_text() == "mine too"


def test_an_empty_directory_may_be_used(tmp_path: Path) -> None:
    assert slao.merge_trained(slao.SlaoStore(tmp_path), adapter(1)).sequence == 1


def test_there_is_no_history_where_nothing_was_merged(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", saved(tmp_path / "adapter", state())):
        with pytest.raises(AdapterNotFoundError, match="there is no merge history"):
            slao.SlaoStore(path).history()
        with pytest.raises(AdapterNotFoundError, match="there is no merge history"):
            slao.SlaoStore(path).rollback(1)


def test_a_store_that_keeps_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettingError, match="keep_last"):
        slao.SlaoStore(tmp_path, keep_last=0)


def test_a_disk_without_room_is_found_out_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_with(tmp_path / "m", 1)
    before = fingerprint(store.path / "snapshots")
    monkeypatch.setattr("trainwarden.checkpoint.durable.free_bytes", lambda directory: 1000)
    with pytest.raises(DiskFullError):
        slao.merge_trained(store, adapter(2))
    assert fingerprint(store.path / "snapshots") == before


def test_a_directory_that_cannot_be_made_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SLAOCheckpointError, match="cannot save"):
        slao.merge_trained(slao.SlaoStore(tmp_path / "file" / "m"), adapter(1))


def test_tensors_that_merging_only_replaced_are_stored_once(tmp_path: Path) -> None:
    store = store_with(tmp_path / "m", 1, 2)
    folder = snapshot_file(store, 2).parent
    assert all(".lora_B." in key for key in load_file(folder / "finetuned.safetensors"))
    assert load_file(snapshot_file(store, 1).with_name("finetuned.safetensors")) == {}


def test_a_snapshot_in_memory_can_be_merged_on_without_a_store(tmp_path: Path) -> None:
    store = store_with(tmp_path / "m", 1)
    preview = slao.propose(store, adapter(2)).preview()
    assert (preview.sequence, preview.index) == (2, 2)
    assert preview.path == tmp_path / "m" / "snapshots" / "step-00000001"
    assert same(replace(preview, path=None).exported(), slao.merge_trained(store, adapter(2)).exported())
