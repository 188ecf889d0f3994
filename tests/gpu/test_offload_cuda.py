"""Full fine-tuning with FSDP2 and CPU offload on CUDA over NCCL: the same weights, on the host. Skipped without a GPU.

Needs transformers and accelerate; neither pydantic nor torchao, but for the ranks that torchrun starts.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not (dist.is_available() and dist.is_nccl_available()), reason="needs NCCL"),
]
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tests.train.test_recovery import faulty  # noqa: E402 - after the skips
from tests.train.tiny import (  # noqa: E402
    GPT2,
    LLAMA,
    checkpoint_parts,
    distance,
    identical,
    instructions,
    model_weights,
    settings,
)
from trainwarden.errors import TrainingAbortedError  # noqa: E402
from trainwarden.events import StepCompleted  # noqa: E402
from trainwarden.testing import MemoryCeiling  # noqa: E402
from trainwarden.train import Trainer  # noqa: E402

ROWS = instructions(30)
ASKED = {"max_steps": 10, "batch_size": 4, "grad_accum_steps": 2, "seed": 3, "device": "cuda", "dtype": "float32"}
LARGER = {**LLAMA, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.cuda.empty_cache()


def train(model: Any, run_dir: Path, **changes: Any) -> Any:
    return Trainer(model, ROWS, output_dir=run_dir, **settings(**{**ASKED, "full_ft_offload": True, **changes})).train()


def test_one_gpu_trains_the_same_weights_as_without_offload(tmp_path: Path) -> None:
    plain = train(LLAMA, tmp_path / "plain", full_ft_offload=False, eval_rows=4)
    offloaded = train(LLAMA, tmp_path / "offloaded", eval_rows=4)
    assert distance(model_weights(tmp_path / "offloaded"), model_weights(tmp_path / "plain")) < 1e-5
    assert offloaded.eval_loss == pytest.approx(plain.eval_loss, rel=1e-5)


def test_weights_gradients_and_optimizer_stay_on_the_host(tmp_path: Path) -> None:
    """Less of the GPU than the weights alone would take: they, their gradients and the moments are 16 bytes each."""
    torch.cuda.empty_cache()
    result = train(LARGER, tmp_path, batch_size=1, max_steps=2, dtype="bfloat16")
    numbers = sum(tensor.numel() for tensor in model_weights(tmp_path).values())
    assert result.peak_memory_bytes < 4 * numbers
    state = checkpoint_parts(tmp_path)["optimizer"]["state"][0]
    assert state["exp_avg"].dtype is torch.float32


def test_a_stopped_run_continues_bit_identically(tmp_path: Path) -> None:
    def stop(event: Any) -> None:
        if isinstance(event, StepCompleted) and event.step == 4:
            signal.raise_signal(signal.SIGTERM)

    config = {**GPT2, "resid_pdrop": 0.2}
    train(config, tmp_path / "whole", dtype="bfloat16")
    with pytest.raises(TrainingAbortedError):
        train(config, tmp_path / "stopped", dtype="bfloat16", observers=[stop])
    train(config, tmp_path / "stopped", dtype="bfloat16")
    assert identical(model_weights(tmp_path / "stopped"), model_weights(tmp_path / "whole"))


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_batch_that_fits_no_longer_is_trained_in_parts(tmp_path: Path, phase: Any) -> None:
    from torch.distributed.fsdp import FSDPModule

    if not hasattr(FSDPModule, "reset_iter_state"):
        pytest.skip("this torch cannot bring FSDP back from a failed pass: such a run is started again instead")
    train(LLAMA, tmp_path / "undisturbed")
    ceiling = MemoryCeiling(2, phase=phase, times=1)
    trainer = faulty(LLAMA, tmp_path / "squeezed", rows=ROWS, wrap=ceiling, **{**ASKED, "full_ft_offload": True})
    trainer.train()
    assert ceiling.struck == 1
    assert distance(model_weights(tmp_path / "squeezed"), model_weights(tmp_path / "undisturbed")) < 1e-5


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_what_one_trains(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(
        f"from tests.gpu.test_offload_cuda import LLAMA, train\ntrain(LLAMA, {str(tmp_path / 'two')!r}, batch_size=2)\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*launcher, str(script)], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, check=False, timeout=400
    )
    assert done.returncode == 0
    train(LLAMA, tmp_path / "one")
    assert distance(model_weights(tmp_path / "two"), model_weights(tmp_path / "one")) < 1e-5
