"""Whatever happens to the files, a damaged checkpoint is never loaded, and the one before it is."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainwarden.checkpoint import CheckpointStore, Manifest
from trainwarden.checkpoint.manifest import FileRecord
from trainwarden.errors import CheckpointError

from .states import is_intact, newest, saved

FILES = ["manifest.json", "model.json", "model.safetensors", "optimizer.json", "optimizer.safetensors"]


def flip(position: float) -> Callable[[Path], object]:
    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[int(position * (len(content) - 1))] ^= 0x10
        file.write_bytes(content)

    return damage


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped first byte": flip(0),
    "flipped early byte": flip(0.1),
    "flipped middle byte": flip(0.5),
    "flipped last byte": flip(1),
    "cut in the middle": lambda file: os.truncate(file, file.stat().st_size // 2),
    "one byte short": lambda file: os.truncate(file, file.stat().st_size - 1),
    "one byte more": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "empty": lambda file: file.write_bytes(b""),
    "zeroed": lambda file: file.write_bytes(b"\0" * file.stat().st_size),
    "missing": lambda file: file.unlink(),
    "a directory": lambda file: (file.unlink(), file.mkdir()),
    "of another step": lambda file: shutil.copy(file.parents[1] / "step-00000001" / file.name, file),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_damaged_one_is_rejected_by_name_and_the_one_before_is_loaded(
    tmp_path: Path, file: str, damage: str
) -> None:
    store = saved(tmp_path, 1, 2)
    DAMAGES[damage](tmp_path / "step-00000002" / file)
    with pytest.raises(CheckpointError) as raised:
        store.verify(tmp_path / "step-00000002")
    rejected: list[tuple[str, str]] = []
    checkpoint = newest(tmp_path, rejected)
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert is_intact(checkpoint)
    assert rejected == [("step-00000002", raised.value.problem)]
    assert file in str(raised.value.problem)


def test_a_change_of_any_single_byte_of_any_file_is_noticed(tmp_path: Path) -> None:
    store = saved(tmp_path, 2)
    for file in sorted((tmp_path / "step-00000002").iterdir()):
        content = file.read_bytes()
        with file.open("r+b", buffering=0) as handle:
            for position in range(len(content)):
                os.pwrite(handle.fileno(), bytes([content[position] ^ 1 << position % 8]), position)
                with pytest.raises(CheckpointError):
                    store.load(tmp_path / "step-00000002")
                os.pwrite(handle.fileno(), content[position : position + 1], position)
    assert is_intact(store.load(tmp_path / "step-00000002"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("missing", "model.safetensors is missing"),
        ("one byte short", "model.safetensors: it has .* bytes instead of"),
        ("flipped last byte", "model.safetensors: its SHA-256 differs"),
        ("flipped early byte", "model.safetensors: the header is unreadable"),
        ("a directory", "model.safetensors: it has .* bytes|model.safetensors cannot be read"),
    ],
)
def test_the_reason_is_a_sentence_that_names_the_file(tmp_path: Path, damage: str, reason: str) -> None:
    store = saved(tmp_path, 2)
    DAMAGES[damage](tmp_path / "step-00000002" / "model.safetensors")
    with pytest.raises(CheckpointError, match=reason):
        store.load(tmp_path / "step-00000002")


def test_a_missing_file_is_found_before_any_other_is_read_through(tmp_path: Path) -> None:
    store = saved(tmp_path, 2)
    DAMAGES["flipped last byte"](tmp_path / "step-00000002" / "model.safetensors")
    DAMAGES["missing"](tmp_path / "step-00000002" / "optimizer.json")
    with pytest.raises(CheckpointError, match=r"optimizer\.json is missing"):
        store.load(tmp_path / "step-00000002")


def test_an_unreadable_file_is_named_with_what_the_system_said(tmp_path: Path) -> None:
    store = saved(tmp_path, 2)
    file = tmp_path / "step-00000002" / "model.json"
    file.unlink()
    file.symlink_to(file.name)  # a loop: no permission is needed to make it, and root cannot read it either
    with pytest.raises(CheckpointError, match=r"model\.json cannot be read \(Too many levels"):
        store.load(tmp_path / "step-00000002")


def test_a_checkpoint_under_the_name_of_another_step_is_rejected(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000099")
    rejected: list[tuple[str, str]] = []
    checkpoint = newest(tmp_path, rejected)
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert rejected == [("step-00000099", "manifest.json: it belongs to step 2")]


def test_several_damaged_ones_are_walked_past_newest_first(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, 4)
    for step in (2, 3, 4):
        (tmp_path / f"step-0000000{step}" / "model.json").unlink()
    rejected: list[tuple[str, str]] = []
    checkpoint = newest(tmp_path, rejected)
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert [name for name, _ in rejected] == ["step-00000004", "step-00000003", "step-00000002"]


def test_when_none_is_valid_the_error_names_each_with_its_reason(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / "step-00000001" / "model.json").unlink()
    (tmp_path / "step-00000002" / "manifest.json").write_text("{}")
    rejected: list[tuple[str, str]] = []
    with pytest.raises(CheckpointError) as raised:
        newest(tmp_path, rejected)
    assert len(rejected) == 2
    assert all(name in str(raised.value) and reason in str(raised.value) for name, reason in rejected)


def test_a_missing_part_is_not_made_up_from_another_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    for name in ("optimizer.json", "optimizer.safetensors"):
        (tmp_path / "step-00000002" / name).unlink()
    checkpoint = newest(tmp_path, [])
    assert checkpoint is not None
    assert checkpoint.step == 1


def forge(path: Path, contents: dict[str, bytes]) -> None:
    """Replace files of a checkpoint and make its manifest right again."""
    manifest = Manifest.parse((path / "manifest.json").read_bytes())
    files = dict(manifest.files)
    for name, content in contents.items():
        (path / name).write_bytes(content)
        files[name] = FileRecord(len(content), hashlib.sha256(content).hexdigest())
    forged = Manifest.describe(manifest.step, files, manifest.parts, manifest.meta)
    (path / "manifest.json").write_bytes(forged.to_bytes())


@given(
    file=st.sampled_from(["model.json", "model.safetensors"]),
    content=st.binary(max_size=80)
    | st.sampled_from([b"[" * 9999, b'{"$type": "eval"}', b'{"$type": "dtype", "value": "os"}', b"1e999999"]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_forged_checkpoint_is_data_or_refused(tmp_path: Path, file: str, content: bytes) -> None:
    directory = tmp_path / "forged"
    shutil.rmtree(directory, ignore_errors=True)
    store = saved(directory, 1)
    forge(directory / "step-00000001", {file: content})
    with suppress(CheckpointError):
        store.load(directory / "step-00000001")


def test_a_tensor_that_the_skeleton_needs_and_the_file_lacks_is_refused(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)
    other = (tmp_path / "step-00000001" / "optimizer.safetensors").read_bytes()
    forge(tmp_path / "step-00000001", {"model.safetensors": other})
    with pytest.raises(CheckpointError, match="tensor 'weight' is missing"):
        store.load(tmp_path / "step-00000001")


def test_a_directory_that_cannot_be_listed_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(CheckpointError, match="Not a directory"):
        CheckpointStore(tmp_path / "checkpoints").load_newest(on_rejected=print)
    with pytest.raises(CheckpointError, match="Not a directory"):
        saved(tmp_path / "checkpoints", 1)
