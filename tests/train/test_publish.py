"""Folders that are published: complete or not there, and nothing of anybody else's touched."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from trainwarden.errors import CheckpointError, DiskFullError, InvalidSettingError
from trainwarden.train.publish import MARKER, publish, read_marker, require_ours


def writing(**files: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name, text in files.items():
            path = folder / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MARKER
    }


def test_a_new_folder_appears_whole_with_its_hashes(tmp_path: Path) -> None:
    folder = publish(tmp_path / "model", writing(weights="1234", base__config="{}"), facts={"step": 3})
    assert contents(folder) == {"weights": "1234", "base/config": "{}"}
    marker = read_marker(folder)
    assert marker is not None
    assert marker["step"] == 3
    assert marker["files"]["weights"] == hashlib.sha256(b"1234").hexdigest()
    assert set(marker["files"]) == {"weights", "base/config"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_publishing_again_replaces_ours_and_keeps_what_a_user_added(tmp_path: Path) -> None:
    folder = publish(tmp_path / "model", writing(old="1", both="1"), facts={})
    (folder / "notes.txt").write_text("mine")
    (folder / "sub").mkdir()
    (folder / "sub" / "deep.txt").write_text("mine too")
    publish(folder, writing(both="2", new="2", base__x="2"), facts={"step": 2})
    assert contents(folder) == {
        "both": "2",
        "new": "2",
        "base/x": "2",
        "notes.txt": "mine",
        "sub/deep.txt": "mine too",
    }
    assert (read_marker(folder) or {})["step"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_of_somebody_elses_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("precious")
    for attempt in (require_ours, lambda folder: publish(folder, writing(weights="new"), facts={})):
        with pytest.raises(InvalidSettingError, match="did not write"):
            attempt(tmp_path / "model")
    assert contents(tmp_path / "model") == {"weights": "precious"}


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file")
    with pytest.raises(InvalidSettingError):
        require_ours(tmp_path / "model")


def test_an_empty_folder_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    require_ours(tmp_path / "model")
    publish(tmp_path / "model", writing(weights="1"), facts={})
    assert contents(tmp_path / "model") == {"weights": "1"}


def test_a_failed_write_leaves_the_published_folder_as_it_was(tmp_path: Path) -> None:
    folder = publish(tmp_path / "model", writing(weights="good"), facts={"step": 1})

    def fail(partial: Path) -> None:
        (partial / "weights").write_text("ha")
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(CheckpointError, match="Input/output error"):
        publish(folder, fail, facts={"step": 2})
    assert contents(folder) == {"weights": "good"}
    assert (read_marker(folder) or {})["step"] == 1


def test_what_a_killed_run_left_is_cleared_away(tmp_path: Path) -> None:
    class Killed(BaseException): ...

    def die(partial: Path) -> None:
        writing(weights="half", base__x="half")(partial)
        raise Killed

    with pytest.raises(Killed):
        publish(tmp_path / "model", die, facts={})
    assert not (tmp_path / "model").exists()
    publish(tmp_path / "model", writing(weights="whole"), facts={})
    assert contents(tmp_path / "model") == {"weights": "whole"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_users_folder_of_the_temporary_name_is_not_cleared_away(tmp_path: Path) -> None:
    mine = tmp_path / ".model.partial"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError):
        publish(tmp_path / "model", writing(weights="1"), facts={})
    assert contents(mine) == {"notes.txt": "mine"}


def test_a_full_disk_is_typed(tmp_path: Path) -> None:
    def full(partial: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFullError):
        publish(tmp_path / "model", full, facts={})
    with pytest.raises(DiskFullError):
        publish(tmp_path / "model", writing(weights="1"), facts={}, needed_bytes=2**62)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 3}'])
def test_a_damaged_marker_is_no_marker(tmp_path: Path, text: str) -> None:
    (tmp_path / MARKER).write_text(text)
    assert read_marker(tmp_path) is None
