"""Amounts: read from what can really be used, the least of several devices, and never a guess."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwarden.capability import Quantity, Status, Verdict
from trainwarden.capability.machine import TorchBuild
from trainwarden.capability.quantities import Readings, quantities, version
from trainwarden.capability.verdict import supported, unknown, unsupported
from trainwarden.device import HostMemory, Unknown, Unsupported

from .scripted import GIB, ScriptedMachine, cards, gpus, without_gpu


def amounts(machine: ScriptedMachine, cuda: Verdict) -> dict[str, Quantity]:
    return quantities(Readings.take(machine, Path()), cuda)


def test_a_mixed_machine_counts_by_its_weakest_gpu() -> None:
    machine = ScriptedMachine(devices=cards(80 * GIB, 24 * GIB))
    found = amounts(machine, supported("works", devices=gpus(90, 89)))
    assert (found["gpus"].amount, found["sm"].amount, found["vram"].amount) == (2, 89, 24 * GIB)
    assert "the least of 2, on cuda:1 (GPU 89)" in found["vram"].reason
    assert "the least of 2, on cuda:1" in found["sm"].reason


def test_memory_is_the_drivers_total_because_torch_leaves_a_part_out() -> None:
    found = amounts(ScriptedMachine(devices=cards(80 * GIB)), supported("works", devices=gpus(90)))
    assert found["vram"].amount == 80 * GIB


def test_memory_is_torchs_total_where_the_driver_lists_other_devices() -> None:
    found = amounts(ScriptedMachine(devices=cards()), supported("works", devices=gpus(90)))
    assert found["vram"].amount == 79 * GIB


def test_a_card_that_does_not_tell_its_memory_counts_with_what_torch_sees() -> None:
    machine = ScriptedMachine(devices=cards(80 * GIB))
    machine.devices().devices[0].lose()  # type: ignore[attr-defined]
    assert amounts(machine, supported("works", devices=gpus(90)))["vram"].amount == 79 * GIB


def test_gpus_that_torch_cannot_use_are_not_there_but_are_mentioned() -> None:
    machine = ScriptedMachine(devices=cards(80 * GIB, 80 * GIB), build=TorchBuild("2.13.0+cpu", None))
    found = amounts(machine, unsupported("torch is built without CUDA"))
    assert found["gpus"] == Quantity(0, "0", "torch is built without CUDA; the driver lists 2", Status.UNSUPPORTED)
    assert found["vram"].amount is None
    assert found["cuda"].reason == "torch is built without CUDA; the driver supports up to 12.8"


@pytest.mark.parametrize("name", ["gpus", "vram", "sm", "cuda"])
def test_gpus_that_could_not_be_tried_are_unknown_and_not_zero(name: str) -> None:
    found = amounts(ScriptedMachine(), unknown("no answer within 60 s"))[name]
    assert (found.amount, found.status) == (None, Status.UNKNOWN)
    assert "no answer within 60 s" in found.reason


def test_cuda_is_the_version_that_torch_uses() -> None:
    found = amounts(ScriptedMachine(), supported("works", devices=gpus(90)))["cuda"]
    assert (found.amount, found.found) == ((12, 6), "12.6")
    assert found.reason == "torch's CUDA; the driver supports up to 12.8"


def test_rocm_has_neither_cuda_nor_a_compute_capability() -> None:
    machine = ScriptedMachine(build=TorchBuild("2.13.0", None, "6.4"))
    found = amounts(machine, supported("works", devices=[{**gpus(90)[0], "sm": None}]))
    assert found["cuda"].status is Status.UNSUPPORTED
    assert found["sm"].status is Status.UNKNOWN


def test_a_missing_driver_differs_from_a_silent_one() -> None:
    missing = without_gpu(driver=Unsupported("no NVML library"))
    silent = without_gpu(driver=Unknown("nvmlInit did not answer within 5 s"))
    assert amounts(missing, unsupported("x"))["driver"].status is Status.UNSUPPORTED
    assert amounts(silent, unsupported("x"))["driver"].status is Status.UNKNOWN


def test_a_driver_whose_version_is_no_version_is_unknown() -> None:
    assert amounts(ScriptedMachine(driver="devel"), unsupported("x"))["driver"].status is Status.UNKNOWN


def test_memory_of_a_container_is_its_limit_and_says_so() -> None:
    machine = without_gpu(memory=HostMemory(8 * GIB, 7 * GIB, GIB, "cgroup"))
    found = amounts(machine, unsupported("x"))["ram"]
    assert found.amount == 8 * GIB
    assert "limit of the container" in found.reason


def test_an_unreadable_disk_is_unknown() -> None:
    found = amounts(without_gpu(disk=Unknown("Stale file handle")), unsupported("x"))["disk"]
    assert (found.status, found.reason) == (Status.UNKNOWN, "Stale file handle")


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=6))
def test_zeros_at_the_end_of_a_version_mean_nothing(parts: list[int]) -> None:
    text = ".".join(map(str, parts))
    assert version(text) == version(f"{text}-server")
    if len(parts) < 6:
        assert version(text) == version(f"{text}.0")


@given(st.text(max_size=20))
def test_a_version_begins_with_a_digit_or_is_none(text: str) -> None:
    found = version(text)
    assert (found is not None) == bool(text[:1].isascii() and text[:1].isdigit())
