"""One block for a merged state: disjoint, kept for the next one, and never in use twice."""

from __future__ import annotations

import gc
import mmap
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainwarden import slao
from trainwarden.slao import arena

from .adapters import same

LARGE = arena.SMALLEST_BYTES // 4
needs_advice = pytest.mark.skipif(not hasattr(mmap, "MADV_FREE"), reason="this system takes no advice about memory")


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    arena.forget()
    yield
    arena.forget()


def state(numel: int, fill: float = 0.0) -> dict[str, Tensor]:
    return {"x": torch.full((numel // 2, 2), fill), "y": torch.full((3,), fill)}


@settings(max_examples=30)
@given(shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=6), large=st.booleans())
def test_every_tensor_has_room_of_its_own(shapes: list[list[int]], large: bool) -> None:
    like = {str(number): torch.zeros(shape, dtype=torch.bfloat16) for number, shape in enumerate(shapes)}
    if large:
        like["large"] = torch.zeros(LARGE, dtype=torch.bfloat16)
    rooms = arena.room_for(like)
    assert {key: room.shape for key, room in rooms.items()} == {key: value.shape for key, value in like.items()}
    for number, room in enumerate(rooms.values()):
        assert room.dtype == torch.float32
        assert room.is_contiguous()
        room.fill_(float(number))
    assert all(bool((room == number).all()) for number, room in enumerate(rooms.values()))


@needs_advice
def test_a_block_that_nobody_uses_is_taken_again() -> None:
    first = arena.room_for(state(LARGE))
    address = first["x"].data_ptr()
    del first
    assert arena.room_for(state(LARGE))["x"].data_ptr() == address


@needs_advice
def test_a_block_is_in_use_as_long_as_one_of_its_tensors_is() -> None:
    first = arena.room_for(state(LARGE))
    part = first["y"].fill_(7.0)
    del first
    gc.collect()
    second = arena.room_for(state(LARGE))
    for room in second.values():
        room.fill_(1.0)
    assert part.tolist() == [7.0] * 3


@needs_advice
def test_at_most_one_block_is_kept_and_only_for_a_state_of_its_size() -> None:
    states = [arena.room_for(state(LARGE)) for _ in range(3)]
    states.clear()
    assert len(arena._kept) == 1
    other = arena.room_for(state(2 * LARGE))
    assert arena._kept == []
    del other
    arena.forget()
    assert arena._kept == []


@needs_advice
def test_a_kernel_that_takes_no_advice_costs_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unadvised(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(arena.mmap, "mmap", Unadvised)
    rooms = arena.room_for(state(LARGE))
    assert rooms["x"].fill_(2.0).sum() == 2 * LARGE
    del rooms
    assert arena._kept == []


def test_a_small_state_is_left_to_the_allocator() -> None:
    rooms = arena.room_for(state(10))
    del rooms
    assert arena._kept == []


def test_merges_in_reused_blocks_are_those_in_fresh_ones() -> None:
    def adapter(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return {"l.lora_A.weight": torch.randn(4, LARGE // 4), "l.lora_B.weight": torch.randn(64, 4)}

    def chain(*, fresh: bool) -> dict[str, Tensor]:
        accumulator = slao.begin(adapter(1)).tensors
        for index in (2, 3, 4):
            if fresh:
                arena.forget()
            accumulator = slao.merge(accumulator, adapter(index), index).tensors
        return accumulator

    reused, expected = chain(fresh=False), chain(fresh=True)
    assert same(reused, expected)
