"""A `Trainer` on a CUDA device: one sampler for guard and log lines. Skipped without one; needs no pydantic."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train import tiny
from tests.train.tiny import LLAMA, instructions
from trainwarden.events import Event, MetricsLogged, StepCompleted
from trainwarden.train import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def sampling() -> int:
    return sum(thread.name == "trainwarden-sampler" for thread in threading.enumerate())


def test_the_devices_are_sampled_by_one_thread_which_ends_with_the_run(tmp_path: Path) -> None:
    events: list[Event] = []
    threads: list[int] = []
    before = sampling()

    def observe(event: Event) -> None:
        events.append(event)
        if isinstance(event, StepCompleted):
            threads.append(sampling() - before)

    asked: dict[str, Any] = {"device": "cuda", "observers": [observe]}
    result = Trainer(LLAMA, instructions(24), output_dir=tmp_path, **tiny.settings(**asked)).train()
    assert max(threads) == 1
    assert sampling() == before
    assert result.peak_memory_bytes
    assert all(event.memory_bytes for event in events if isinstance(event, MetricsLogged))
