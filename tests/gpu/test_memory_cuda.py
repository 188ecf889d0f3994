"""Predicted memory beside what CUDA's allocator really hands out. Skipped without a device.

Needs torch only. The limits are those of the project: allocated memory within 2 % of the prediction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from trainwarden.memory.trace import TrainingLoop, trace
from trainwarden.memory.trace_loop import run_steps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WIDTH, HEADS, VOCAB = 1024, 16, 16000


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        out: torch.Tensor = x + self.down(functional.gelu(self.up(self.between(x))))
        return out


class LanguageModel(nn.Module):
    """A decoder whose blocks are checkpointed if asked to, in one type throughout."""

    def __init__(self, depth: int = 4, *, dtype: torch.dtype = torch.bfloat16, checkpointing: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(depth))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.to(dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x)
        return functional.cross_entropy(self.head(x).float().flatten(0, 1), ids.flatten())


def real_peak(build: Callable[[], nn.Module], loop: TrainingLoop, batch: torch.Tensor) -> int:
    """``max_memory_allocated`` of two steps, after a smaller run has let the libraries take their workspaces."""
    run_steps(nn.Linear(8, 8).cuda(), torch.zeros(8, 8, device="cuda"), TrainingLoop())
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with torch.device("cuda"):
        model = build()
        batch = batch.cuda()
    torch.cuda.reset_peak_memory_stats()
    autocast = None if loop.autocast is None else torch.autocast("cuda", loop.autocast)
    run_steps(model, batch, loop, autocast=autocast)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def adamw(**options: Any) -> TrainingLoop:
    return TrainingLoop(make_optimizer=lambda p: torch.optim.AdamW(p, **options))


@pytest.mark.parametrize("tokens", [512, 4096])
@pytest.mark.parametrize(
    ("build", "loop"),
    [
        (LanguageModel, adamw()),
        (LanguageModel, adamw(fused=True)),
        (lambda: LanguageModel(checkpointing=True), adamw(fused=True)),
        (lambda: LanguageModel(depth=12, checkpointing=True), adamw()),
        (lambda: LanguageModel(dtype=torch.float32), adamw(fused=True)),
        (LanguageModel, TrainingLoop(grad_accum_steps=2, max_grad_norm=1.0)),
        (
            LanguageModel,
            TrainingLoop(make_optimizer=lambda p: torch.optim.AdamW(p, fused=True), optimizer_in_backward=True),
        ),
    ],
    ids=["foreach", "fused", "checkpointing", "deep", "float32", "accumulated", "in-backward"],
)
def test_the_allocators_peak_is_predicted(build: Callable[[], nn.Module], loop: TrainingLoop, tokens: int) -> None:
    batch = torch.ones(1, tokens, dtype=torch.long)
    real = real_peak(build, loop, batch)
    assert trace(build, batch, loop).peak_bytes == pytest.approx(real, rel=0.02)


def test_an_optimizer_that_was_told_nothing_is_foreach_on_cuda() -> None:
    model = nn.Linear(1024, 1024)
    weights = 4 * (1024 * 1024 + 1024)
    real = real_peak(lambda: nn.Linear(1024, 1024), TrainingLoop(), torch.zeros(1, 1024))
    assert real == pytest.approx(5 * weights, rel=0.05)
    assert trace(lambda: model.to("meta"), torch.zeros(1, 1024), TrainingLoop()).peak_bytes == pytest.approx(
        real, rel=0.02
    )


def test_predicting_takes_no_device_memory() -> None:
    before = torch.cuda.memory_allocated()
    trace(LanguageModel, torch.ones(1, 64, dtype=torch.long), TrainingLoop())
    assert torch.cuda.memory_allocated() == before
