"""Names: every checkpoint has one of its own, and nothing of the user's is taken for ours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwarden.checkpoint import layout
from trainwarden.checkpoint.layout import Slot

slots = st.builds(Slot, st.integers(0, 10**10), st.integers(1, 1000))


@given(slots)
def test_a_slot_is_read_back_from_its_name(slot: Slot) -> None:
    assert Slot.parse(slot.name) == slot
    assert layout.writer_of(layout.temporary_name(slot)) == os.getpid()


@given(slots, slots)
def test_names_of_different_slots_differ(one: Slot, other: Slot) -> None:
    assert (one.name == other.name) == (one == other)


@given(st.integers(0, 99), st.lists(st.builds(Slot, st.integers(0, 3), st.integers(1, 4))))
def test_the_next_slot_of_a_step_is_free_and_newer(step: int, taken: list[Slot]) -> None:
    slot = layout.next_slot(step, taken)
    assert slot.step == step
    assert all(slot > other for other in taken if other.step == step)


@pytest.mark.parametrize(
    "name",
    [
        "step-40",
        "step-00000040.1",
        "step-00000040.0",
        "step-00000040.02",
        "step-000000040",
        "step-00000040-old",
        "best",
        ".step-00000040",
        "step-00000040.tmp-5",
        "xstep-00000040",
        "step-00000040x",
        "step-0000004٤",
    ],
)
def test_any_other_name_is_not_ours(name: str) -> None:
    assert Slot.parse(name) is None
    assert layout.writer_of(name) is None


@pytest.mark.parametrize("part", ["model", "model.0", "ema_2", "Model-B", "0"])
def test_a_part_may_have_a_plain_file_name(part: str) -> None:
    assert layout.is_part_name(part)
    assert all(layout.is_part_file(name) for name in layout.part_files(part))


@pytest.mark.parametrize("part", ["", "manifest", ".hidden", "a/b", "..", "-x", "a b", "ä", "a\n", "a\0"])
def test_a_part_may_not_have_any_other_name(part: str) -> None:
    assert not layout.is_part_name(part)


@pytest.mark.parametrize("name", ["manifest.json", "notes.txt", "model", "model.pt", ".json", "json", "a/b.json"])
def test_other_files_belong_to_no_part(name: str) -> None:
    assert not layout.is_part_file(name)


@pytest.mark.parametrize(
    ("files", "is_one"),
    [
        (["manifest.json"], True),
        (["model.json"], True),
        (["notes.txt", "model.safetensors"], True),
        (["manifest.json", "manifest.json.retired"], True),
        (["manifest.json.retired", "model.json"], False),
        (["notes.txt"], False),
        ([], False),
    ],
)
def test_a_directory_is_a_checkpoint_by_what_is_in_it(tmp_path: Path, files: list[str], is_one: bool) -> None:
    for name in files:
        (tmp_path / name).touch()
    assert layout.is_checkpoint(tmp_path) == is_one


def test_a_file_or_nothing_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-00000040").touch()
    assert not layout.is_checkpoint(tmp_path / "step-00000040")
    assert not layout.is_checkpoint(tmp_path / "step-00000050")
