"""QLoRA, 8-bit AdamW and the chunked loss on a CUDA device. Skipped without one, and without bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train import tiny
from tests.train.tiny import LLAMA, checkpoint_parts, distance, instructions, model_weights
from trainwarden.capability import require_quantized
from trainwarden.train import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WIDE: dict[str, Any] = {**LLAMA, "hidden_size": 128, "intermediate_size": 256}


def train(run_dir: Path, **changes: Any) -> Any:
    asked = {"device": "cuda", "dtype": "float32", "learning_rate": 1e-3, **changes}
    return Trainer(WIDE, instructions(24), output_dir=run_dir, **tiny.settings(**asked)).train()


def test_bitsandbytes_works_here() -> None:
    pytest.importorskip("bitsandbytes")
    found = require_quantized(["nf4", "adam8bit"], on_cpu=False)
    assert all("cuda" in verdict.reason for verdict in found.values())


def test_qlora_with_8_bit_states_trains_and_keeps_the_adapter_only(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    result = train(tmp_path, mode="qlora", optimizer="adamw_8bit", loss_chunk_tokens=16, lora_rank=64)
    assert result.final_loss < result.first_loss
    assert all("lora_" in name for name in checkpoint_parts(tmp_path)["model"])


def test_the_chunked_loss_trains_the_same_weights(tmp_path: Path) -> None:
    train(tmp_path / "plain")
    train(tmp_path / "chunked", loss_chunk_tokens=16)
    assert distance(model_weights(tmp_path / "chunked"), model_weights(tmp_path / "plain")) < 1e-4
