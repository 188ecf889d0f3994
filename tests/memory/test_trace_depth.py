"""Deep stacks are traced shallow only where that gives what the whole trace gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tests.memory.networks import Block, Stacked, ids
from trainwarden.memory.prediction import Prediction
from trainwarden.memory.trace import TrainingLoop, trace
from trainwarden.memory.trace_depth import DEEP, cut, find_stacks

DEPTH = DEEP


def adamw(**options: Any) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, **options)


def both(
    build: Callable[[], nn.Module], batch: Any, loop: TrainingLoop, **options: Any
) -> tuple[Prediction, Prediction]:
    """Extended from shallow traces, and traced whole."""
    extended = trace(build, batch, loop, **options)
    return extended, trace(build, batch, loop, depth="full", **options)


def assert_same(extended: Prediction, whole: Prediction) -> None:
    assert any("extended from traces" in note for note in extended.notes)
    assert not any("extended" in note for note in whole.notes)
    assert extended.peak_bytes == pytest.approx(whole.peak_bytes, rel=1e-5)
    assert (extended.phase, extended.operation) == (whole.phase, whole.operation)
    for kind, nbytes in whole.breakdown.items():
        assert extended.breakdown[kind] == pytest.approx(nbytes, rel=1e-4, abs=2048)
    for phase, peak in whole.phases.items():
        assert extended.phases[phase] == pytest.approx(peak, rel=1e-3)


@pytest.mark.parametrize(
    ("loop", "checkpointing"),
    [
        (TrainingLoop(make_optimizer=adamw(fused=True)), False),
        (TrainingLoop(make_optimizer=adamw(foreach=True), grad_accum_steps=2), True),
        (TrainingLoop(make_optimizer=adamw(foreach=False), max_grad_norm=1.0), False),
        (TrainingLoop(make_optimizer=adamw(foreach=False)), True),
        (TrainingLoop(make_optimizer=adamw(fused=True), optimizer_in_backward=True), True),
    ],
    ids=["fused", "foreach-accumulated", "loop-clipped", "loop", "in-backward"],
)
def test_the_extended_peak_is_the_whole_ones(loop: TrainingLoop, checkpointing: bool) -> None:
    def build() -> nn.Module:
        return Stacked(depth=DEPTH, checkpointing=checkpointing)

    assert_same(*both(build, ids(), loop, device_type="cuda"))


def test_a_first_block_that_needs_no_gradient_for_its_input_is_told_apart() -> None:
    def build() -> nn.Module:
        model = Stacked(depth=DEPTH)
        model.embedding.requires_grad_(False)
        return model

    assert_same(*both(build, ids(8, 32), TrainingLoop(), device_type="cpu"))


def test_two_stacks_are_extended_each_on_its_own() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.ModuleList(Block(16, n) for n in range(DEPTH))
            self.decoder = nn.Sequential(*(Block(32, n) for n in range(DEPTH + 1)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.encoder:
                x = block(x)
            out: torch.Tensor = self.decoder(torch.cat([x, x], -1))
            return out

    extended, whole = both(Two, torch.zeros(8, 16), TrainingLoop(), device_type="cpu")
    assert_same(extended, whole)
    assert "9 blocks of encoder, 10 blocks of decoder" in extended.notes[0]


def test_shards_are_extended_as_well() -> None:
    loop = TrainingLoop(make_optimizer=adamw(fused=True))
    extended, whole = both(lambda: Stacked(depth=DEPTH), ids(), loop, device_type="cpu", shards=4)
    assert extended.peak_bytes == pytest.approx(whole.peak_bytes, rel=1e-4)
    offloaded, all_offloaded = both(lambda: Stacked(depth=DEPTH), ids(), loop, device_type="cpu", cpu_offload=True)
    assert offloaded.host_bytes == pytest.approx(all_offloaded.host_bytes, rel=1e-4)


def test_a_shallow_stack_is_traced_whole() -> None:
    found = trace(lambda: Stacked(depth=DEEP - 1), ids(), TrainingLoop())
    assert found.notes == ()


def test_blocks_that_differ_are_traced_whole_and_the_difference_is_told() -> None:
    def build() -> nn.Module:
        model = Stacked(depth=DEPTH)
        model.blocks[7].scale = 2.0
        return model

    found = trace(build, ids(), TrainingLoop(), device_type="cpu")
    assert found.notes == ("traced whole: blocks: block 7 differs from block 0 in scale",)
    assert found == replace(trace(build, ids(), TrainingLoop(), device_type="cpu", depth="full"), notes=found.notes)


class Uneven(Block):
    """Looks equal to its neighbours, and every third one keeps more."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out = super().forward(hidden)
        return torch.exp(torch.exp(out)) if self.number % 3 == 2 else out


class EverSmaller(Block):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out = super().forward(hidden)
        return out + torch.exp(out[:, :, : 64 - self.number**2 % 64]).sum(-1, keepdim=True)


@pytest.mark.parametrize("kind", [Uneven, EverSmaller])
def test_blocks_that_only_behave_differently_are_found_out(kind: type[Block]) -> None:
    def build() -> nn.Module:
        model = Stacked(depth=DEPTH)
        model.blocks = nn.ModuleList(kind(64, number) for number in range(DEPTH))
        return model

    found = trace(build, ids(16, 64), TrainingLoop(), device_type="cpu")
    assert found.notes[0].startswith("traced whole: ")
    assert found.peak_bytes == trace(build, ids(16, 64), TrainingLoop(), device_type="cpu", depth="full").peak_bytes


def test_a_model_that_misses_its_blocks_is_traced_whole() -> None:
    class Numbered(Stacked):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            hidden = self.embedding(ids)
            for number in range(DEPTH):
                hidden = self.blocks[number](hidden)
            return hidden.mean()

    found = trace(lambda: Numbered(depth=DEPTH), ids(), TrainingLoop())
    assert found.notes == ("traced whole: IndexError: index 4 is out of range",)
    whole = trace(lambda: Numbered(depth=DEPTH), ids(), TrainingLoop(), depth="full")
    assert found == replace(whole, notes=found.notes)


def test_a_model_whose_code_counts_its_blocks_is_traced_whole() -> None:
    class Counted(Stacked):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            if len(self.blocks) != DEPTH:
                raise RuntimeError("blocks are missing")
            return super().forward(ids)

    assert trace(lambda: Counted(depth=DEPTH), ids(), TrainingLoop()).notes == (
        "traced whole: RuntimeError: blocks are missing",
    )


# -- finding and cutting ----------------------------------------------------------------------------------------------


def test_stacks_are_the_outermost_containers_of_one_class() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3))
            self.mixed = nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)])
            self.empty = nn.ModuleList([nn.ReLU(), nn.ReLU()])
            self.one = nn.ModuleList([nn.Linear(4, 4)])

    (stack,) = find_stacks(Model())
    assert (stack.path, stack.depth, stack.difference, stack.units) == (
        "layers", 3, "", ("layers.0", "layers.1", "layers.2"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda b: setattr(b[2], "scale", 3.0), "block 2 differs from block 0 in scale"),
        (lambda b: setattr(b[2], "number", 7), "block 2 differs from block 0 in number"),
        (lambda b: setattr(b[1], "up", nn.Linear(8, 33)), "block 1 differs from block 0 in up.shapes or types"),
        (lambda b: b[1].down.requires_grad_(False), "block 1 differs from block 0 in down.shapes or types"),
        (lambda b: setattr(b[1], "up", nn.Identity()), "block 1 is built unlike block 0"),
        (lambda b: setattr(b[1], "more", nn.Identity()), "block 1 is built unlike block 0"),
        (lambda b: b[1].to(torch.float16), "block 1 differs from block 0 in up.shapes or types"),
        (lambda b: b[1].register_buffer("table", torch.zeros(1)), "block 1 differs from block 0 in shapes or types"),
    ],
)
def test_differences_between_blocks_are_named(change: Callable[[nn.ModuleList], Any], difference: str) -> None:
    blocks = nn.ModuleList(Block(8, number) for number in range(3))
    change(blocks)
    (stack,) = find_stacks(nn.ModuleDict({"blocks": blocks}))
    assert stack.difference == difference


def test_a_cut_stack_is_whole_again_afterwards_even_after_a_failure() -> None:
    model = Stacked(depth=5)
    stacks = find_stacks(model)
    before = list(model.blocks)
    with pytest.raises(ZeroDivisionError), cut({"blocks": 2}, stacks):
        assert len(model.blocks) == 2
        raise ZeroDivisionError
    assert list(model.blocks) == before
