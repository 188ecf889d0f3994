from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from trainwarden.device import AllocatorMemory, Unknown, allocator_memory
from trainwarden.device.torch_reader import torch_uuids


def running_cuda(**more: object) -> SimpleNamespace:
    """The calls of ``torch.cuda`` that the reader uses, as a process with one busy GPU answers them."""
    return SimpleNamespace(
        cuda=SimpleNamespace(
            is_initialized=lambda: True,
            device_count=lambda: 1,
            memory_allocated=lambda _: 10,
            memory_reserved=lambda _: 20,
            max_memory_allocated=lambda _: 30,
            max_memory_reserved=lambda _: 40,
            get_device_properties=lambda _: SimpleNamespace(**more),
        )
    )


def test_without_torch_the_allocator_is_unknown_and_torch_stays_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    assert allocator_memory(0) == Unknown("torch is not imported")
    assert "torch" not in sys.modules


@pytest.mark.skipif(torch.cuda.is_available(), reason="other tests may have used CUDA in this process")
def test_cuda_is_not_initialised_by_asking() -> None:
    assert allocator_memory(0) == Unknown("CUDA is not initialised in this process")
    assert torch_uuids() == Unknown("CUDA is not initialised in this process")
    assert not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]


def test_with_cuda_in_use_the_allocators_counters_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", running_cuda())
    assert allocator_memory(0) == AllocatorMemory(10, 20, 30, 40)


@pytest.mark.parametrize("index", [-1, 1])
def test_a_device_that_torch_does_not_have_is_unknown(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    monkeypatch.setitem(sys.modules, "torch", running_cuda())
    assert allocator_memory(index) == Unknown(f"torch sees no cuda:{index}")


def test_uuids_come_in_torchs_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", running_cuda(uuid="ABC-1"))
    assert torch_uuids() == ("abc-1",)


def test_a_torch_without_uuids_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", running_cuda())
    assert isinstance(torch_uuids(), Unknown)
