"""Saving, loading, keeping and removing, when nothing goes wrong; and never touching what is not ours."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import threading
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trainwarden.checkpoint.durable as durable
from trainwarden.checkpoint import CheckpointStore, Manifest
from trainwarden.checkpoint.manifest import FileRecord
from trainwarden.errors import CheckpointError, CheckpointNotFoundError, InvalidSettingError

from . import faults
from .states import is_intact, newest, same, saved, state_of


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    path = store.save(40, state_of(40), {"step": 40})
    assert path == tmp_path / "step-00000040"
    checkpoint = newest(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.path, checkpoint.step) == (path, 40)
    assert is_intact(checkpoint)


def test_a_checkpoint_has_the_stated_files_and_nothing_else_is_left(tmp_path: Path) -> None:
    saved(tmp_path, 40)
    assert names(tmp_path) == ["step-00000040"]
    assert names(tmp_path / "step-00000040") == [
        "manifest.json",
        "model.json",
        "model.safetensors",
        "optimizer.json",
        "optimizer.safetensors",
    ]


def test_a_directory_that_does_not_exist_holds_none_and_is_made_by_saving(tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "demo" / "checkpoints"
    assert newest(directory) is None
    assert not directory.exists()
    saved(directory, 1)
    assert newest(directory) is not None


def test_an_empty_directory_holds_none(tmp_path: Path) -> None:
    assert newest(tmp_path) is None


def test_the_newest_step_is_loaded_whatever_the_order_of_writing(tmp_path: Path) -> None:
    saved(tmp_path, 5, 100000000, 20)
    checkpoint = newest(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 100000000


def test_any_one_can_be_loaded_by_its_path(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 2, 3)
    assert is_intact(store.load(tmp_path / "step-00000002"))
    assert store.load(tmp_path / "step-00000002").step == 2


def test_a_checkpoint_copied_to_another_name_is_loaded_from_there(tmp_path: Path) -> None:
    saved(tmp_path / "run", 7)
    (tmp_path / "run" / "step-00000007").rename(tmp_path / "best")
    assert is_intact(CheckpointStore(tmp_path).load(tmp_path / "best"))


def test_a_path_where_nothing_is_has_its_own_error(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for action in (store.load, store.verify):
        with pytest.raises(CheckpointNotFoundError):
            action(tmp_path / "step-00000001")


def test_verifying_returns_the_manifest(tmp_path: Path) -> None:
    manifest = saved(tmp_path, 40).verify(tmp_path / "step-00000040")
    assert isinstance(manifest, Manifest)
    assert manifest.step == 40
    assert manifest.parts == ("model", "optimizer")
    assert all(isinstance(record, FileRecord) for record in manifest.files.values())
    assert manifest.meta == {"step": 40}


def test_the_manifest_tells_nothing_of_the_machine(tmp_path: Path) -> None:
    saved(tmp_path, 40)
    text = (tmp_path / "step-00000040" / "manifest.json").read_text()
    assert str(tmp_path) not in text
    assert str(Path.home()) not in text
    assert os.uname().nodename not in text


def test_a_part_may_be_empty_and_there_may_be_none(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, {}, {})
    assert store.load(tmp_path / "step-00000001").parts == {}
    store.save(2, {"a": {}, "b": None, "c": 5}, {})
    assert store.load(tmp_path / "step-00000002").parts == {"a": {}, "b": None, "c": 5}


def test_large_and_small_tensors_come_back(tmp_path: Path) -> None:
    sizes = [1, (1 << 18) - 1, 1 << 18, (1 << 18) + 1, 5 << 20, 3, 1 << 18]
    tree = {str(place): torch.randn(size) for place, size in enumerate(sizes)}
    store = CheckpointStore(tmp_path)
    assert same(store.load(store.save(1, {"m": tree}, {})).parts["m"], tree)


def test_loaded_tensors_do_not_depend_on_the_files(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)
    checkpoint = store.load(tmp_path / "step-00000001")
    for path in (tmp_path / "step-00000001").iterdir():
        path.write_bytes(b"\0" * path.stat().st_size)
    assert is_intact(checkpoint)


def test_saving_changes_nothing_in_the_live_state(tmp_path: Path) -> None:
    state = state_of(3)
    weight = state["model"]["weight"]
    CheckpointStore(tmp_path).save(3, state, {})
    assert same(state, state_of(3))
    assert state["model"]["weight"] is weight


# Keeping and removing


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, *range(1, 6), keep_last=2)
    assert names(tmp_path) == ["step-00000004", "step-00000005"]


def test_keeping_fewer_than_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettingError):
        CheckpointStore(tmp_path, keep_last=0)


def test_a_new_process_keeps_the_same_ones(tmp_path: Path) -> None:
    for step in range(1, 6):
        saved(tmp_path, step, keep_last=2)
    assert names(tmp_path) == ["step-00000004", "step-00000005"]


def test_a_damaged_one_does_not_count_as_kept(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / "step-00000002" / "model.json").unlink()
    saved(tmp_path, 3, keep_last=2)
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]
    saved(tmp_path, 4, keep_last=2)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def test_one_damaged_after_it_was_verified_does_not_count_either(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 2, keep_last=2)
    with (tmp_path / "step-00000002" / "model.json").open("r+b") as file:
        file.write(b"!")
    store.save(3, state_of(3), {"step": 3})
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]


def test_predecessors_are_not_read_again_at_every_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = saved(tmp_path, 1, 2, keep_last=3)
    verified: list[str] = []
    monkeypatch.setattr(CheckpointStore, "verify", lambda _, path: verified.append(path.name))
    store.save(3, state_of(3), {"step": 3})
    assert verified == []


def test_a_damaged_newer_one_is_read_once_and_not_at_every_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = saved(tmp_path, 1, 90)
    with (tmp_path / "step-00000090" / "model.json").open("r+b") as file:
        file.write(b"!")
    read: list[str] = []
    real = CheckpointStore.verify
    monkeypatch.setattr(CheckpointStore, "verify", lambda store, path: (read.append(path.name), real(store, path))[1])
    for step in (2, 3, 4):
        store.save(step, state_of(step), {"step": step})
    assert read.count("step-00000090") == 1


def test_one_that_cannot_be_removed_does_not_keep_the_others(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 2)
    store.keep_last = 1

    def forbid(name: str, real: Any, arguments: tuple[Any, ...]) -> Any:
        if name in ("rename", "unlink") and "step-00000001" in str(arguments[0]):
            raise PermissionError
        return real(*arguments)

    with faults.operations(forbid):
        store.save(3, state_of(3), {"step": 3})
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_step_may_be_any_kind_of_integer_but_not_negative(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    assert store.load(store.save(np.int64(5), {}, {})).step == 5  # type: ignore[arg-type]
    with pytest.raises(InvalidSettingError):
        store.save(-1, {}, {})


def test_saving_a_step_again_leaves_the_new_one_and_never_replaces_in_place(tmp_path: Path) -> None:
    store = saved(tmp_path, 20, 40, keep_last=2)
    (tmp_path / "step-00000040" / "model.safetensors").write_bytes(b"damaged")
    path = store.save(40, state_of(40), {"step": 40})
    assert path.name == "step-00000040.2"
    assert names(tmp_path) == ["step-00000020", "step-00000040.2"]
    checkpoint = newest(tmp_path)
    assert checkpoint is not None
    assert checkpoint.path == path
    assert is_intact(checkpoint)


def test_a_retrained_earlier_step_is_not_removed_for_a_damaged_later_one(tmp_path: Path) -> None:
    saved(tmp_path, 80, 100, keep_last=2)
    (tmp_path / "step-00000100" / "manifest.json").write_bytes(b"")
    store = saved(tmp_path, 90, keep_last=1)
    assert names(tmp_path) == ["step-00000090", "step-00000100"]
    store.save(110, state_of(110), {"step": 110})
    assert names(tmp_path) == ["step-00000110"]


# What is not ours


def test_unknown_files_survive_wherever_they_lie(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    user = [
        tmp_path / "notes.txt",
        tmp_path / "step-00000001.bak",
        tmp_path / ".step-00000001.tmp-x",
        tmp_path / "step-00000001" / "notes.json",
        tmp_path / "step-00000001" / "model.pt",
        tmp_path / "step-00000001" / "eval" / "model.json",
        tmp_path / "step-00000000",
    ]
    for path in user:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    saved(tmp_path, 2, 3, 4, keep_last=1)
    assert [path.read_text() for path in user] == ["mine"] * len(user)
    assert names(tmp_path / "step-00000001") == ["eval", "model.pt", "notes.json"]
    assert newest(tmp_path) is not None


def test_a_directory_with_only_files_of_the_user_is_no_damaged_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / "step-00000001" / "notes.txt").write_text("mine")
    saved(tmp_path, 2, keep_last=1)
    for file in (tmp_path / "step-00000002").iterdir():
        file.unlink()
    assert newest(tmp_path) is None


def test_without_a_manifest_only_files_of_our_parts_are_removed(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / "step-00000001" / "manifest.json").write_text("damaged")
    (tmp_path / "step-00000001" / "notes.json").write_text("mine")
    saved(tmp_path, 2, 3, keep_last=1)
    assert names(tmp_path / "step-00000001") == ["notes.json"]


def test_a_manifest_cannot_direct_the_removal_elsewhere(tmp_path: Path) -> None:
    saved(tmp_path / "checkpoints", 1)
    (tmp_path / "precious.json").write_text("mine")
    (tmp_path / "precious.safetensors").write_text("mine")
    manifest = Manifest.describe(
        1,
        {f"../../precious.{kind}": FileRecord(4, "00") for kind in ("json", "safetensors")},
        ("../../precious",),
        {},
    )
    (tmp_path / "checkpoints" / "step-00000001" / "manifest.json").write_bytes(manifest.to_bytes())
    saved(tmp_path / "checkpoints", 2, 3, keep_last=1)
    assert (tmp_path / "precious.json").exists()
    assert (tmp_path / "precious.safetensors").exists()


def test_a_link_to_a_directory_is_not_followed(tmp_path: Path) -> None:
    saved(tmp_path / "elsewhere", 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step-00000001").symlink_to(tmp_path / "elsewhere" / "step-00000001")
    (tmp_path / "run" / ".step-00000001.tmp-999999999").symlink_to(tmp_path / "elsewhere" / "step-00000001")
    saved(tmp_path / "run", 2, 3, keep_last=1)
    assert newest(tmp_path / "elsewhere") is not None


# Left-overs of killed saves


def leftover(directory: Path, pid: int) -> Path:
    path = directory / f".step-00000009.tmp-{pid}"
    path.mkdir(parents=True)
    for name in ("model.safetensors", "model.json", "renamed_part.json", "manifest.json.tmp"):
        (path / name).write_text("half")
    return path


def dead_pid() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_left_overs_of_dead_processes_are_swept_at_the_next_save(tmp_path: Path) -> None:
    path = leftover(tmp_path, dead_pid())
    saved(tmp_path, 10)
    assert not path.exists()


def test_left_overs_are_no_checkpoints(tmp_path: Path) -> None:
    leftover(tmp_path, dead_pid())
    assert newest(tmp_path) is None


def test_files_of_the_user_in_left_overs_survive(tmp_path: Path) -> None:
    path = leftover(tmp_path, dead_pid())
    (path / "notes.txt").write_text("mine")
    saved(tmp_path, 10)
    assert names(path) == ["notes.txt"]


def test_what_a_living_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    mine, of_parent = leftover(tmp_path, os.getpid()), leftover(tmp_path, os.getppid())
    saved(tmp_path, 10)
    assert len(names(mine)) == len(names(of_parent)) == 4


def test_left_overs_of_an_earlier_process_with_the_number_of_a_living_one_are_swept(tmp_path: Path) -> None:
    path = leftover(tmp_path, os.getpid())
    os.utime(path, (1_000_000_000, 1_000_000_000))
    saved(tmp_path, 10)
    assert not path.exists()


def test_a_dead_process_that_nobody_waited_for_is_dead(tmp_path: Path) -> None:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.close(write)
    os.read(read, 1)  # returns when the child is gone and the pipe with it
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    try:
        path = leftover(tmp_path, pid)
        saved(tmp_path, 10)
        assert not path.exists()
    finally:
        os.waitpid(pid, 0)
        os.close(read)


# Refusals


@pytest.mark.parametrize("part", ["manifest", "../model", "a/b", "", ".x"])
def test_a_part_that_cannot_be_a_file_name_is_refused(tmp_path: Path, part: str) -> None:
    with pytest.raises(CheckpointError, match="a part cannot be called"):
        CheckpointStore(tmp_path).save(1, {part: {}}, {})
    assert names(tmp_path) == []


@pytest.mark.parametrize("meta", [{"a": object()}, {"a": {1, 2}}, {(1, 2): 3}])
def test_a_meta_that_is_not_json_is_refused_before_anything_is_written(tmp_path: Path, meta: Any) -> None:
    with pytest.raises(CheckpointError, match="meta is not JSON"):
        CheckpointStore(tmp_path / "new").save(1, {}, meta)
    assert not (tmp_path / "new").exists()


def test_a_state_that_cannot_be_stored_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"scheduler\.lambdas\[0\]: a function"):
        CheckpointStore(tmp_path / "new").save(1, {"model": {}, "scheduler": {"lambdas": [print]}}, {})
    assert not (tmp_path / "new").exists()


def test_a_nan_in_the_meta_stays_a_nan(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    assert str(store.load(store.save(1, {}, {"loss": float("nan")})).meta["loss"]) == "nan"


# Readers beside a writer


def test_a_reader_beside_a_writer_always_gets_a_whole_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    steps: list[int] = []
    failures: list[BaseException] = []
    done, started = threading.Event(), threading.Event()

    def read() -> None:
        try:
            while not done.is_set() or not steps:
                checkpoint = newest(tmp_path)
                assert checkpoint is not None
                assert is_intact(checkpoint)
                steps.append(checkpoint.step)
                started.set()
        except BaseException as error:  # noqa: BLE001 - boundary of the thread; shown by the test
            failures.append(error)
        finally:
            started.set()

    reader = threading.Thread(target=read)
    reader.start()
    started.wait()
    for step in count(2):
        saved(tmp_path, step, keep_last=1)
        if failures or (step >= 30 and len(set(steps)) > 3):
            break
    done.set()
    reader.join()
    assert failures == []
    assert steps == sorted(steps)
    assert len(set(steps)) > 3


def test_a_checkpoint_that_goes_while_it_is_asked_why_it_did_not_load_is_not_a_bad_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1)
    saved(tmp_path, 2)
    (tmp_path / "step-00000002" / "manifest.json").write_text("{")
    real, listed = Path.iterdir, []

    def gone_the_second_time(path: Path) -> Any:
        if path.name == "step-00000002":
            listed.append(path)
            if len(listed) == 2:
                shutil.rmtree(path)
        return real(path)

    monkeypatch.setattr(Path, "iterdir", gone_the_second_time)
    checkpoint = newest(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert len(listed) >= 2


@pytest.mark.parametrize("position", range(1, 9))
def test_a_reader_that_stops_while_its_checkpoint_is_removed_gets_the_next(
    tmp_path: Path, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = saved(tmp_path, 1, keep_last=1)
    opened = 0
    real = Path.open

    def open_later(path: Path, *args: Any, **kwargs: Any) -> Any:
        nonlocal opened
        if path.parent.name == "step-00000001":
            opened += 1
            if opened == position:
                monkeypatch.setattr(Path, "open", real)
                writer.save(2, state_of(2), {"step": 2})
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_later)
    checkpoint = newest(tmp_path)
    assert checkpoint is not None
    assert is_intact(checkpoint)


def test_a_reader_at_every_moment_of_a_removal_rejects_nothing(tmp_path: Path) -> None:
    seen: list[int] = []

    def look(name: str, real: Any, arguments: tuple[Any, ...]) -> Any:
        result = real(*arguments)
        checkpoint = newest(tmp_path)
        assert checkpoint is not None
        seen.append(checkpoint.step)
        return result

    store = saved(tmp_path, 1, keep_last=1)
    with faults.operations(look):
        store.save(2, state_of(2), {"step": 2})
    assert seen == sorted(seen)
    assert set(seen) == {1, 2}


# How it is written


def test_every_file_is_synced_before_the_manifest_has_its_name_and_all_before_the_checkpoint_has_its(
    tmp_path: Path,
) -> None:
    log: list[str] = []
    descriptors: dict[int, str] = {}

    def note(name: str, real: Any, arguments: tuple[Any, ...]) -> Any:
        result = real(*arguments)
        if name == "open":
            descriptors[result] = Path(arguments[0]).name
        target = descriptors[arguments[0]] if name in ("write", "fsync") else Path(arguments[0]).name
        log.append(f"{name} {re.sub('tmp-.*', 'tmp', target)}")
        return result

    store = saved(tmp_path / "checkpoints", 1, keep_last=1)
    with faults.operations(note):
        store.save(2, {"model": {"w": torch.zeros(2)}}, {})

    def place(entry: str) -> int:
        return log.index(entry)

    for file in ("model.safetensors", "model.json", "manifest.json.tmp"):
        assert place(f"write {file}") < place(f"fsync {file}") < place("rename manifest.json.tmp")
    assert place("rename manifest.json.tmp") < place("fsync .step-00000002.tmp") < place("rename .step-00000002.tmp")
    assert place("rename .step-00000002.tmp") < len(log) - 1 - log[::-1].index("fsync checkpoints")
    assert len(log) - 1 - log[::-1].index("fsync checkpoints") < place("unlink model.safetensors")


def test_the_room_changes_the_disk_only_through_the_watched_functions_and_knows_no_pickle() -> None:
    other_ways = {
        "write_text",
        "write_bytes",
        "touch",
        "truncate",
        "symlink_to",
        "hardlink_to",
        "link",
        "remove",
    }
    other_ways |= {
        "makedirs",
        "removedirs",
        "renames",
        "pwrite",
        "writev",
        "sendfile",
        "copy_file_range",
        "utime",
    }
    for path in Path(durable.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                of_os = isinstance(node.value, ast.Name) and node.value.id == "os"
                assert node.attr not in other_ways, path.name
                assert not (of_os and node.attr == "replace"), path.name
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.fullmatch(r"[wax]b?\+?b?|r\+b?|rb\+", node.value), path.name  # modes of open()
            if isinstance(node, ast.Import):
                modules = {alias.name for alias in node.names}
                assert not modules & {"shutil", "tempfile", "pickle", "marshal", "shelve"}, path.name


def test_the_skeleton_files_are_json(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    skeleton = json.loads((tmp_path / "step-00000001" / "model.json").read_text())
    assert skeleton["$type"] == "OrderedDict"
