from __future__ import annotations

import os
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.cuda import _parse_visible_devices, _transform_uuid_to_ordinals

from trainwarden.device.visible import MigPart, PhysicalGpu, Selection, select

FOUR = [PhysicalGpu(i, f"GPU-{c * 8}-0000", "H100") for i, c in enumerate("abcd")]
MIG = PhysicalGpu(0, "GPU-mig", "A100", True, (MigPart("MIG-one", 1, 0), MigPart("MIG-two", 2, 0)))
MIXED = [PhysicalGpu(0, "GPU-fast", "H100"), PhysicalGpu(1, "GPU-slow", "T4")]


def seen(setting: str | None, gpus: list[PhysicalGpu] = FOUR) -> Selection:
    return select(gpus, {} if setting is None else {"CUDA_VISIBLE_DEVICES": setting})


def numbers(selection: Selection) -> list[int]:
    return [device.gpu.nvml_index for device in selection.devices]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ("0", [0]),
        ("3,1", [3, 1]),
        (" 2 , 0 ", [2, 0]),
        ("+1", [1]),
        ("1gpu,2x", [1, 2]),
        ("GPU-bbbbbbbb-0000,GPU-aaaaaaaa-0000", [1, 0]),
        ("GPU-c", [2]),
    ],
)
def test_devices_come_in_the_order_of_the_variable(setting: str | None, expected: list[int]) -> None:
    selection = seen(setting)
    assert numbers(selection) == expected
    assert selection.note == ""


@pytest.mark.parametrize(
    ("setting", "expected", "note"),
    [
        ("", [], "CUDA_VISIBLE_DEVICES is empty"),
        ("-1", [], "'-1' names no GPU here"),
        ("0,2,-1,1", [0, 2], "'-1' names no GPU here; 2 visible before it"),
        ("1,9,2", [1], "'9' names no GPU here; 1 visible before it"),
        ("none", [], "'none' names no GPU here"),
        ("0,0", [], "twice"),
        ("GPU-aaaaaaaa-0000,GPU-aaaaaaaa-0000", [], "twice"),
        ("GPU-a,GPU-aa", [], "twice"),
        ("GPU-zzz,GPU-aaaaaaaa-0000", [], "'GPU-zzz' names no GPU here"),
        ("GPU-b,0", [1], "'0' names no GPU here; 1 visible before it"),
        ("0,GPU-b", [0], "'GPU-b' names no GPU here"),
        ("GPU-", [], "fits 4 devices"),
    ],
)
def test_a_list_ends_at_its_first_bad_entry_and_that_is_said(setting: str, expected: list[int], note: str) -> None:
    selection = seen(setting)
    assert numbers(selection) == expected
    assert note in selection.note


def test_a_gpu_in_mig_mode_is_its_first_part() -> None:
    (device,) = seen("0", [MIG]).devices
    assert device.part == MigPart("MIG-one", 1, 0)


@pytest.mark.parametrize("name", ["MIG-two", "MIG-GPU-mig/2/0"])
def test_a_mig_part_is_found_by_its_uuid_and_by_its_legacy_name(name: str) -> None:
    (device,) = seen(name, [MIG]).devices
    assert device.part is not None
    assert device.part.uuid == "MIG-two"


def test_a_mig_uuid_of_another_machine_names_nothing() -> None:
    selection = seen("MIG-gone", [MIG])
    assert selection.devices == ()
    assert "names no GPU here" in selection.note


def test_beside_whole_gpus_those_in_mig_mode_stay_hidden_and_that_is_said() -> None:
    selection = seen(None, [MIG, FOUR[1]])
    assert numbers(selection) == [1]
    assert "MIG UUID" in selection.note


def test_alone_a_gpu_in_mig_mode_shows_one_part_as_cuda_does() -> None:
    assert [device.part and device.part.uuid for device in seen(None, [MIG]).devices] == ["MIG-one"]


def test_mig_mode_without_an_instance_shows_nothing_and_says_so() -> None:
    selection = seen(None, [PhysicalGpu(0, "GPU-mig", "A100", True)])
    assert selection.devices == ()
    assert "none has an instance" in selection.note


class TestGpusOfDifferentModels:
    def test_may_be_numbered_otherwise_by_cuda_which_is_said(self) -> None:
        assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in seen("1", MIXED).note
        assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in seen(None, MIXED).note

    def test_are_certain_when_named_by_uuid_or_ordered_by_bus(self) -> None:
        assert seen("GPU-slow", MIXED).note == ""
        ordered = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "1"}
        assert select(MIXED, ordered) == Selection(seen("GPU-slow", MIXED).devices, "")


entries = st.one_of(st.integers(-2, 6).map(str), st.sampled_from(["", "x", "1x", "+2", " 3", "GPU-a"]))
uuids = st.one_of(
    st.sampled_from([gpu.uuid or "" for gpu in FOUR]), st.sampled_from(["GPU-a", "GPU-", "GPU-zz", "0", ""])
)


@given(st.lists(entries, min_size=1, max_size=5) | st.lists(uuids, min_size=1, max_size=4))
def test_the_choice_is_the_one_that_torch_makes(parts: list[str]) -> None:
    setting = ",".join(parts)
    assert numbers(seen(setting)) == chosen_by_torch(setting)


def chosen_by_torch(setting: str) -> list[int]:
    with patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": setting}):
        chosen = _parse_visible_devices()
    if chosen and isinstance(chosen[0], str):
        names = [name for name in chosen if isinstance(name, str)]
        return _transform_uuid_to_ordinals(names, [gpu.uuid or "" for gpu in FOUR])
    ordinals = [number for number in chosen if isinstance(number, int)]
    beyond = next((place for place, number in enumerate(ordinals) if number >= len(FOUR)), len(ordinals))
    return ordinals[:beyond]
