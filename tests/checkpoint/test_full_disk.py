"""A full disk, a quota, a broken disk: a typed error, nothing lost, nothing left behind."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch

from trainwarden.checkpoint import CheckpointStore
from trainwarden.errors import CheckpointError, DiskFullError, WardenError

from . import faults
from .states import is_intact, newest, saved, state_of


def big_state(megabytes: float) -> dict[str, torch.Tensor]:
    return {"model": torch.zeros(int(megabytes * (1 << 20)), dtype=torch.uint8)}


def check(directory: Path, step: int = 1) -> None:
    assert [path.name for path in directory.iterdir()] == [f"step-{step:08d}"]
    checkpoint = newest(directory)
    assert checkpoint is not None
    assert is_intact(checkpoint)


def test_what_does_not_fit_is_refused_before_anything_is_written(small_disk: Path) -> None:
    store = saved(small_disk, 1)
    made: list[str] = []

    def note(name: str, real: object, arguments: tuple[object, ...]) -> object:
        made.append(name)
        return real(*arguments)  # type: ignore[operator]

    with faults.operations(note), pytest.raises(DiskFullError) as raised:
        store.save(2, big_state(8), {})
    assert set(made) <= {"mkdir", "open", "fsync"}  # of the directory itself
    assert raised.value.needed_bytes >= 8 << 20
    assert 0 < raised.value.free_bytes < 4 << 20
    check(small_disk)


def test_a_disk_that_fills_up_meanwhile_is_the_same_error(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = saved(small_disk, 1)
    monkeypatch.setattr("trainwarden.checkpoint.store.refuse_if_full", mock.Mock())
    with pytest.raises(DiskFullError) as raised:
        store.save(2, big_state(8), {})
    assert isinstance(raised.value.__cause__, OSError)
    assert raised.value.needed_bytes >= 8 << 20
    check(small_disk)


def test_saving_goes_on_when_there_is_room_again(small_disk: Path) -> None:
    store = saved(small_disk, 1)
    (small_disk / "notes.bin").write_bytes(b"\0" * (3 << 20))
    with pytest.raises(DiskFullError):
        store.save(2, state_of(2), {"step": 2})
    (small_disk / "notes.bin").unlink()
    store.save(2, state_of(2), {"step": 2})
    assert newest(small_disk).step == 2  # type: ignore[union-attr]


def test_a_full_disk_without_any_checkpoint_is_left_as_it_was(small_disk: Path) -> None:
    (small_disk / "notes.bin").write_bytes(b"\0" * (4 << 20))
    with pytest.raises(DiskFullError):
        saved(small_disk / "run" / "checkpoints", 1)
    assert (small_disk / "notes.bin").stat().st_size == 4 << 20


def test_a_limit_on_the_size_of_files_is_a_full_disk(tmp_path: Path) -> None:
    saved(tmp_path, 1)

    def save_too_much() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        with pytest.raises(DiskFullError) as raised:
            CheckpointStore(tmp_path).save(2, big_state(1), {})
        assert raised.value.needed_bytes is None  # what the disk has free is beside the point
        assert isinstance(raised.value.__cause__, OSError)
        assert raised.value.__cause__.errno == errno.EFBIG

    assert faults.in_child(save_too_much) == 0
    check(tmp_path)


ERRORS = {
    errno.ENOSPC: DiskFullError,
    errno.EDQUOT: DiskFullError,
    errno.EFBIG: DiskFullError,
    errno.EIO: CheckpointError,
    errno.EACCES: CheckpointError,
}


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_an_operation_that_fails_is_a_typed_error_and_leaves_what_was(tmp_path: Path, number: int) -> None:
    directory = tmp_path / "checkpoints"
    saved(directory, 1)
    operations = faults.count(lambda: saved(tmp_path / "other", 2))
    failed = 0
    for position in range(1, operations + 12):
        error = error_of_save_failing_at(directory, position, number)
        if error is not None:
            failed += 1
            assert type(error) is ERRORS[number]
            assert isinstance(error.__cause__, OSError)
            if (directory / "step-00000002").exists():  # it was in place, and only the last sync failed
                assert is_intact(CheckpointStore(directory).load(directory / "step-00000002"))
                shutil.rmtree(directory / "step-00000002")
            check(directory)
        else:  # only what is done after the new one is safe may fail unsaid
            assert newest(directory).step == 2  # type: ignore[union-attr]
            shutil.rmtree(directory)
            saved(directory, 1)
    assert failed > 20


def error_of_save_failing_at(directory: Path, position: int, number: int) -> WardenError | None:
    with faults.operations(faults.failing_at(position, number)):
        try:
            saved(directory, 2, keep_last=1)
        except WardenError as error:
            return error
    return None


def test_what_the_disk_garbles_is_noticed_before_it_counts(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, keep_last=1)

    def garble(name: str, real: object, arguments: tuple[object, ...]) -> object:
        if name == "write" and len(arguments[1]) > 40:  # type: ignore[arg-type]
            content = bytearray(arguments[1])  # type: ignore[arg-type]
            content[-1] ^= 1
            return real(arguments[0], content)  # type: ignore[operator]
        return real(*arguments)  # type: ignore[operator]

    with faults.operations(garble), pytest.raises(CheckpointError, match="does not read back") as raised:
        store.save(2, state_of(2), {"step": 2})
    assert raised.value.operation == "save"
    check(tmp_path)


def test_an_interrupt_while_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)

    def interrupt(name: str, real: object, arguments: tuple[object, ...]) -> object:
        if name == "fsync" and seen.append(name) is None and len(seen) == 4:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[operator]

    seen: list[str] = []
    with faults.operations(interrupt), pytest.raises(KeyboardInterrupt):
        store.save(2, state_of(2), {"step": 2})
    check(tmp_path)


def test_a_save_whose_remains_could_not_be_removed_can_be_repeated(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)

    def break_down(name: str, real: object, arguments: tuple[object, ...]) -> object:
        if name in ("unlink", "rmdir") or (name == "fsync" and len(list(tmp_path.glob(".step-*/*"))) > 2):
            raise OSError(errno.EIO, "broken")
        return real(*arguments)  # type: ignore[operator]

    with faults.operations(break_down), pytest.raises(CheckpointError):
        store.save(2, state_of(2), {"step": 2})
    assert len(list(tmp_path.glob(".step-*/*"))) > 2
    store.save(2, state_of(2), {"step": 2})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_short_write_is_continued(tmp_path: Path) -> None:
    def short(name: str, real: object, arguments: tuple[object, ...]) -> object:
        if name == "write":
            return real(arguments[0], arguments[1][:7])  # type: ignore[operator,index]
        return real(*arguments)  # type: ignore[operator]

    with faults.operations(short):
        saved(tmp_path, 1)
    check(tmp_path)


def test_a_file_system_that_does_not_tell_its_size_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(path: object) -> os.statvfs_result:
        return os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255))

    monkeypatch.setattr("trainwarden.checkpoint.durable.os.statvfs", unknown)
    saved(tmp_path, 1)
    check(tmp_path)


def test_a_removal_that_is_not_allowed_does_not_fail_the_save_and_is_tried_again(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, keep_last=1)

    def forbid(name: str, real: object, arguments: tuple[object, ...]) -> object:
        if name in ("unlink", "rmdir"):
            raise PermissionError(errno.EPERM, "not permitted")
        return real(*arguments)  # type: ignore[operator]

    with faults.operations(forbid):
        store.save(2, state_of(2), {"step": 2})
    assert newest(tmp_path).step == 2  # type: ignore[union-attr]
    store.save(3, state_of(3), {"step": 3})
    check(tmp_path, step=3)
