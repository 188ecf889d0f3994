"""Cards by name, and the largest model by technique."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwarden.memory.cards import CARDS, COMMON, UnknownCardError, find_card
from trainwarden.memory.ceilings import TECHNIQUES, ceiling_billions, ceilings, reference_decoder
from trainwarden.memory.overheads import Overheads

GIB = 2**30
NAMES = [technique.name for technique in TECHNIQUES]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("RTX 4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("h100 pcie", "H100"),
        ("A100", "A100 40GB"),
        ("A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("V100", "V100 16GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
    ],
)
def test_a_card_is_known_by_the_names_people_and_drivers_use(asked: str, found: str) -> None:
    assert find_card(asked).name == found


@pytest.mark.parametrize(("asked", "near"), [("RTX 4091", "RTX 4090"), ("H1000", "H100")])
def test_an_unknown_card_names_the_closest(asked: str, near: str) -> None:
    with pytest.raises(UnknownCardError) as caught:
        find_card(asked)
    assert near in caught.value.closest


@pytest.mark.parametrize("asked", ["", "   ", "NVIDIA", "nonsense", "RTX"])
def test_what_names_no_card_is_refused(asked: str) -> None:
    with pytest.raises(UnknownCardError):
        find_card(asked)


def test_every_card_finds_itself_and_has_about_the_memory_of_its_name() -> None:
    for card in CARDS:
        assert find_card(card.name) is card
        assert 0.9 <= card.memory_bytes / (card.nominal_gb * GIB) <= 1.03
    assert all(find_card(name).name == name for name in COMMON)


@pytest.mark.parametrize("billions", [0.5, 1.5, 3.0, 7.0, 14.0, 70.0])
def test_a_reference_model_has_the_size_asked_for(billions: float) -> None:
    assert reference_decoder(billions).parameters / 1e9 == pytest.approx(billions, rel=0.06)


def test_the_table_agrees_with_what_was_traced_for_a_24_gb_card() -> None:
    """Traced ceilings of the notes: bf16 2.5, 8-bit 3.3, paged 5.1, in backward 9.5, LoRA 9.6, QLoRA 29 billion."""
    found = dict(zip(NAMES, ceilings(24 * GIB, Overheads()), strict=True))
    expected = {
        "full bf16": 2.5,
        "full 8-bit": 3.3,
        "full paged": 5.1,
        "full in backward": 9.5,
        "LoRA": 9.6,
        "QLoRA": 29.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=0.1)


@settings(deadline=None, max_examples=12, print_blob=True)
@given(gib=st.integers(6, 180))
def test_a_larger_card_never_carries_less_and_a_cheaper_technique_never_less(gib: int) -> None:
    here, larger = (ceilings(size * GIB, Overheads()) for size in (gib, gib + 8))
    assert all(small <= big for small, big in zip(here, larger, strict=True))
    by_name = dict(zip(NAMES, here, strict=True))
    order = ["full fp32", "full bf16", "full 8-bit", "full paged", "full in backward"]
    assert [by_name[name] for name in order] == sorted(by_name[name] for name in order)
    assert by_name["QLoRA"] >= by_name["LoRA"]


def test_a_card_too_small_for_anything_carries_nothing() -> None:
    assert ceiling_billions(TECHNIQUES[0].plan, GIB // 2, Overheads()) == 0.0
