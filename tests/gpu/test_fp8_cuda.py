"""LoRA in FP8 on a GPU that computes in it (compute capability 8.9 or newer). Skipped without it or torchao."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.train import tiny
from tests.train.tiny import LLAMA, distance, instructions, model_weights
from trainwarden.events import Event, MetricsLogged, Notice
from trainwarden.testing import MemoryCeiling
from trainwarden.train import Trainer
from trainwarden.train.fp8 import frozen_layers_in_fp8

has_fp8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_fp8, reason="needs a CUDA device of compute capability 8.9 or newer"),
    pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao (extra torchao)"),
]

MODEL = {**LLAMA, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 4}
STEPS = 30


class Squeezed(Trainer):
    """A trainer whose micro-batches of more than 4 rows no longer fit from the second half on."""

    ceiling: Any = None

    def compute_loss(self, model: nn.Module, batch: Any) -> Any:
        return self.ceiling(lambda part: super(Squeezed, self).compute_loss(model, part))(batch)


def settings(run_dir: Path, events: list[Event], **changes: Any) -> dict[str, Any]:
    asked = {"mode": "lora", "device": "cuda", "max_steps": STEPS, "log_every_steps": 1, "learning_rate": 3e-3}
    return tiny.settings(output_dir=run_dir, observers=[events.append], **{**asked, **changes})


def train(run_dir: Path, kind: type[Trainer] = Trainer, **changes: Any) -> tuple[list[float], list[str]]:
    """The losses of the steps, and what was said."""
    events: list[Event] = []
    kind(MODEL, instructions(64), **settings(run_dir, events, **changes)).train()
    losses = [event.loss for event in events if isinstance(event, MetricsLogged) and event.loss is not None]
    return losses, [event.text for event in events if isinstance(event, Notice)]


def test_a_short_run_learns_and_stays_within_five_percent_of_bf16(tmp_path: Path) -> None:
    losses, told = train(tmp_path / "fp8", fp8=True)
    reference, _ = train(tmp_path / "bf16", dtype="bfloat16")
    assert [sentence for sentence in told if sentence.startswith("FP8")] == [
        "FP8: 28 of 29 linear layers compute in it, adapters not counted; in bf16 stays 1 (the output layer)"
    ]
    assert losses[-1] < losses[0] - 0.1
    assert losses[0] != reference[0], "it did compute in something else"
    # 2.8 % at most in torchao's emulation of the same run on a CPU.
    assert all(abs(fp8 - bf16) < 0.05 * bf16 for fp8, bf16 in zip(losses, reference, strict=True))


def test_a_run_that_is_squeezed_into_smaller_parts_ends_where_the_whole_one_does(tmp_path: Path) -> None:
    train(tmp_path / "whole", fp8=True, learning_rate=1e-3)
    kind: Any = type("SqueezedOnce", (Squeezed,), {"ceiling": staticmethod(MemoryCeiling(4, from_step=1))})
    losses, _ = train(tmp_path / "squeezed", kind, fp8=True, learning_rate=1e-3)
    assert len(losses) == STEPS
    assert kind.ceiling.struck >= 1
    assert distance(model_weights(tmp_path / "squeezed"), model_weights(tmp_path / "whole")) < 0.02


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 250])
def test_the_hardware_gives_what_the_emulation_gives_for_any_number_of_tokens(tokens: int) -> None:
    torch.manual_seed(tokens)
    model = nn.Sequential(nn.Linear(256, 512, device="cuda", dtype=torch.bfloat16)).requires_grad_(False)
    x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
    results = {}
    for emulate in (True, False):
        given = x.detach().requires_grad_()
        told: list[str] = []
        with frozen_layers_in_fp8(model, told.append, emulate=emulate):
            output = model(given)
            output.float().square().sum().backward()
        assert told[0].startswith("FP8: 1 of 1")
        results[emulate] = (output.detach().float(), given.grad)
    for hardware, emulated in zip(results[False], results[True], strict=True):
        assert hardware is not None
        assert emulated is not None
        assert float((hardware - emulated).norm() / emulated.norm()) < 0.02
