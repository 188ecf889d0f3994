"""Device and precision: chosen with a reason, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainwarden.errors import GPUNotAvailableError, InvalidSettingError
from trainwarden.train.precision import choose_device, choose_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    """The hardware boundary: what torch says of a GPU that is not here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def test_a_cpu_that_is_asked_for_is_taken_even_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch)
    assert choose_device("cpu") == (CPU, "as asked")


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_a_usable_gpu_is_taken(monkeypatch: pytest.MonkeyPatch, asked: Any) -> None:
    gpu(monkeypatch)
    assert choose_device(asked)[0] == CUDA


def test_without_a_gpu_the_cpu_is_taken_with_the_reason_and_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert choose_device("auto") == (CPU, "this is a CPU build of torch")
    with pytest.raises(GPUNotAvailableError, match="CPU build"):
        choose_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "no usable CUDA device" in choose_device("auto")[1]


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((8, 9), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_bfloat16_is_chosen_where_the_gpu_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: torch.dtype
) -> None:
    gpu(monkeypatch, capability)
    chosen = choose_precision("auto", CUDA, "full")
    assert chosen.compute is expected
    assert "bfloat16" in chosen.reason


def test_a_cpu_computes_in_float32_and_says_why() -> None:
    chosen = choose_precision("auto", CPU, "full")
    assert (chosen.compute, chosen.accelerate_name) == (torch.float32, "no")
    assert chosen.reason


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_what_goes_with_fp8_is_bfloat16_on_any_device(device: torch.device) -> None:
    chosen = choose_precision("auto", device, "lora", fp8=True)
    assert (chosen.weights, chosen.compute) == (torch.bfloat16, torch.bfloat16)
    assert "FP8" in chosen.reason
    assert choose_precision("bfloat16", device, "lora", fp8=True).reason == "as asked"


@pytest.mark.parametrize(("mode", "weights"), [("full", torch.float32), ("lora", torch.bfloat16)])
def test_only_frozen_weights_are_kept_in_less_than_float32(mode: Any, weights: torch.dtype) -> None:
    chosen = choose_precision("bfloat16", CPU, mode)
    assert (chosen.weights, chosen.compute, chosen.accelerate_name) == (weights, torch.bfloat16, "bf16")


def test_float16_needs_a_gpu() -> None:
    with pytest.raises(InvalidSettingError, match="float16"):
        choose_precision("float16", CPU, "full")
    assert choose_precision("float16", CUDA, "full").accelerate_name == "fp16"
