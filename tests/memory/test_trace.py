"""What a trace says of small models whose memory can be reckoned by hand."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.memory.networks import Stacked, ids, parameter_bytes
from trainwarden.errors import InvalidSettingError
from trainwarden.memory.prediction import KINDS, Prediction
from trainwarden.memory.trace import CannotTraceError, TrainingLoop, default_loss, trace
from trainwarden.memory.trace_loop import MakeOptimizer

WIDTH = 256
WEIGHTS = parameter_bytes(nn.Linear(WIDTH, WIDTH))


def adamw(**options: Any) -> MakeOptimizer:
    return lambda parameters: torch.optim.AdamW(parameters, **options)


def of_linear(loop: TrainingLoop | None = None, rows: int = 1, **options: Any) -> Prediction:
    """One linear layer on so few rows that weights are all that counts."""
    batch = torch.zeros(rows, WIDTH)
    return trace(lambda: nn.Linear(WIDTH, WIDTH), batch, loop or TrainingLoop(), **({"device_type": "cpu"} | options))


def of_stack(loop: TrainingLoop | None = None, **options: Any) -> Prediction:
    return trace(lambda: Stacked(**options), ids(), loop or TrainingLoop(), device_type="cpu")


# -- the optimizer's variants -----------------------------------------------------------------------------------------


def test_fused_adamw_needs_weights_gradients_and_two_states() -> None:
    found = of_linear(TrainingLoop(make_optimizer=adamw(fused=True)))
    assert found.phases["optimizer"] == pytest.approx(4 * WEIGHTS, rel=0.02)


def test_foreach_adamw_needs_a_temporary_as_large_as_all_weights() -> None:
    found = of_linear(TrainingLoop(make_optimizer=adamw(foreach=True)))
    assert found.phase == "optimizer"
    assert found.peak_bytes == pytest.approx(5 * WEIGHTS, rel=0.02)
    assert found.breakdown["temporaries"] == WEIGHTS
    assert found.operation == "aten._foreach_sqrt.default"


def test_on_cuda_an_optimizer_that_was_told_nothing_is_foreach() -> None:
    told_nothing = of_linear(device_type="cuda").phases["optimizer"]
    assert told_nothing == pytest.approx(5 * WEIGHTS, rel=0.02)


def test_on_the_cpu_it_loops_and_needs_temporaries_of_one_parameter_at_a_time() -> None:
    two = trace(
        lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)),
        torch.zeros(1, WIDTH),
        TrainingLoop(),
        device_type="cpu",
    )
    one_at_a_time = 4 * 2 * WEIGHTS + 2 * WEIGHTS  # sqrt and its quotient
    assert two.phases["optimizer"] == pytest.approx(one_at_a_time, rel=0.02)


def test_sgd_without_momentum_keeps_nothing() -> None:
    found = of_linear(TrainingLoop(make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1)))
    assert found.breakdown["optimizer_states"] == 0
    assert found.phases["optimizer"] == pytest.approx(2 * WEIGHTS, rel=0.02)


def test_an_optimizer_in_backward_never_has_all_gradients() -> None:
    loop = TrainingLoop(make_optimizer=adamw(fused=True))
    apart, inside = of_stack(loop, depth=6), of_stack(replace(loop, optimizer_in_backward=True), depth=6)
    gradients = parameter_bytes(Stacked(depth=6))
    assert apart.phases["optimizer"] == pytest.approx(4 * gradients, rel=0.05)
    assert inside.peak_bytes < 3.6 * gradients
    assert inside.phases["optimizer"] < 3.1 * gradients


# -- phases and steps -------------------------------------------------------------------------------------------------


def test_the_second_step_counts_because_states_appear_in_the_first() -> None:
    found = of_linear(TrainingLoop(make_optimizer=adamw(fused=True)), rows=4096)
    activations = 4096 * WIDTH * 4
    assert found.phase in ("forward", "backward")
    assert found.peak_bytes >= 3 * WEIGHTS + 2 * activations
    assert found.breakdown["optimizer_states"] == pytest.approx(2 * WEIGHTS, rel=0.01)


def test_accumulation_keeps_gradients_through_the_next_forward_pass() -> None:
    whole = of_stack(TrainingLoop(make_optimizer=adamw(fused=True)))
    accumulated = of_stack(TrainingLoop(make_optimizer=adamw(fused=True), grad_accum_steps=2))
    more = accumulated.phases["forward"] - whole.phases["forward"]
    assert more == pytest.approx(parameter_bytes(Stacked()), rel=0.02)


def test_accumulating_twice_needs_no_less_than_ten_times() -> None:
    twice, often = (of_stack(TrainingLoop(grad_accum_steps=n)).peak_bytes for n in (2, 5))
    assert twice == often


def test_loading_needs_the_weights_and_the_batch() -> None:
    found = of_linear()
    assert found.phases["load"] == WEIGHTS + WIDTH * 4


def test_frozen_weights_have_neither_gradients_nor_states() -> None:
    def build() -> nn.Module:
        model = Stacked()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("head" in name)
        return model

    found = trace(build, ids(), TrainingLoop(), device_type="cpu")
    head = parameter_bytes(Stacked().head)
    assert found.phases["optimizer"] < parameter_bytes(Stacked()) + 6 * head
    assert found.breakdown["optimizer_states"] <= 2 * head + 64


def test_a_model_without_anything_to_train_still_has_a_forward_pass() -> None:
    def build() -> nn.Module:
        model = nn.Linear(4, 4)
        model.weight.requires_grad_(False)
        return model

    found = trace(build, torch.zeros(1, 4), TrainingLoop(), device_type="cpu")
    assert found.breakdown["gradients"] <= 16


def test_checkpointing_keeps_only_the_inputs_of_blocks() -> None:
    rows, tokens = 8, 64
    kept = {
        on: trace(
            lambda on=on: Stacked(depth=6, checkpointing=on), ids(rows, tokens), TrainingLoop(), device_type="cpu"
        ).phases["forward"]
        for on in (False, True)
    }
    inner = rows * tokens * 64 * 4 * 4  # the output of the ReLU, four times as wide, in float32
    assert kept[False] - kept[True] >= 5 * inner


def test_autocast_keeps_half_size_copies_of_the_weights() -> None:
    plain = of_linear(TrainingLoop(make_optimizer=adamw(fused=True)))
    cast = of_linear(TrainingLoop(make_optimizer=adamw(fused=True), autocast=torch.bfloat16))
    assert cast.phases["forward"] - plain.phases["forward"] == pytest.approx(WEIGHTS / 2, rel=0.05)


def test_autocast_for_cuda_says_by_whose_rules_it_was_traced() -> None:
    found = of_linear(TrainingLoop(autocast=torch.bfloat16), device_type="cuda")
    assert any("autocast" in note for note in found.notes)
    assert not of_linear(TrainingLoop(autocast=torch.bfloat16)).notes


# -- what it says -----------------------------------------------------------------------------------------------------


def test_every_kind_is_found_where_it_must_be() -> None:
    loop = TrainingLoop(make_optimizer=adamw(fused=True))
    found = trace(lambda: Stacked(vocab=5000), ids(8, 64), loop, device_type="cpu")
    assert found.operation == "aten._log_softmax_backward_data.default in the backward pass of the model"
    assert found.breakdown["logits_and_loss"] >= 2 * 8 * 64 * 5000 * 4
    assert found.breakdown["weights"] == parameter_bytes(Stacked(vocab=5000))
    assert sum(found.breakdown[kind] for kind in KINDS) == found.peak_bytes


def test_the_operation_names_the_module_that_ran() -> None:
    found = trace(lambda: Stacked(vocab=10, depth=2), ids(64, 64), TrainingLoop(), device_type="cpu")
    assert found.operation is not None
    assert "in the backward pass of blocks.1" in found.operation


def test_cuda_hands_out_multiples_of_512_bytes() -> None:
    def build() -> nn.Module:
        return nn.Linear(3, 1)

    cpu = trace(build, torch.zeros(1, 3), TrainingLoop(), device_type="cpu")
    cuda = trace(build, torch.zeros(1, 3), TrainingLoop(), device_type="cuda")
    assert cpu.phases["load"] == 3 * 4 + 4 + 3 * 4
    assert cuda.phases["load"] == 3 * 512
    assert all(size % 512 == 0 for size in cuda.breakdown.values())


def test_ties_and_buffers_are_counted_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(50, 8)
            self.head = nn.Linear(8, 50, bias=False)
            self.head.weight = self.embedding.weight
            self.register_buffer("table", torch.zeros(10))
            self.constant = torch.zeros(7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.cross_entropy(self.head(self.embedding(x)).flatten(0, 1), x.flatten())

    found = trace(Tied, ids(1, 4), TrainingLoop(), device_type="cpu")
    assert found.phases["load"] == 50 * 8 * 4 + 10 * 4 + 7 * 4 + 4 * 8


def test_it_can_be_asked_twice_and_says_the_same() -> None:
    assert of_stack() == of_stack()


def test_a_batch_without_values_will_do() -> None:
    assert trace(Stacked, ids().to("meta"), TrainingLoop(), device_type="cpu") == of_stack()


@pytest.mark.parametrize("batch", [{"x": torch.zeros(2, 4)}, (torch.zeros(2, 4),), [torch.zeros(2, 4)]])
def test_batches_may_be_mappings_tuples_and_lists(batch: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
            return self.linear(x), "and more"

    assert default_loss(Model(), batch).ndim == 0
    assert trace(Model, batch, TrainingLoop()).peak_bytes > 0


def test_a_loss_of_ones_own() -> None:
    loop = TrainingLoop(compute_loss=lambda model, batch: model(batch).pow(2).sum())
    assert of_linear(loop).peak_bytes > of_linear(TrainingLoop(make_optimizer=adamw(fused=True))).phases["load"]


# -- what it cannot do ------------------------------------------------------------------------------------------------


class ShapedByWeights(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        return out[out > 0].mean()


class DecidedByWeights(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        return out.mean() if out.sum() > 0 else -out.mean()


class Broken(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyError("no such thing")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (ShapedByWeights, "shape depends on values"),
        (DecidedByWeights, "looks at values"),
        (Broken, "KeyError: 'no such thing'"),
    ],
)
def test_what_cannot_be_traced_says_why(model: type[nn.Linear], reason: str) -> None:
    with pytest.raises(CannotTraceError) as caught:
        trace(lambda: model(4, 4), torch.zeros(2, 4), TrainingLoop())
    assert reason in caught.value.reason
    assert "\n" not in caught.value.reason


def test_a_model_that_cannot_be_built_says_why() -> None:
    def build() -> nn.Module:
        raise OSError("there is no such file")

    with pytest.raises(CannotTraceError, match="there is no such file"):
        trace(build, torch.zeros(1), TrainingLoop())


def test_an_interrupt_is_no_reason_of_the_models() -> None:
    def build() -> nn.Module:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trace(build, torch.zeros(1), TrainingLoop())


def test_a_failure_leaves_hooks_and_loggers_as_they_were() -> None:
    before = dict(torch.nn.modules.module._global_forward_hooks)
    with pytest.raises(CannotTraceError):
        trace(lambda: Broken(4, 4), torch.zeros(2, 4), TrainingLoop())
    assert dict(torch.nn.modules.module._global_forward_hooks) == before
    assert not logging.getLogger("torch._subclasses.fake_tensor").disabled
    assert nn.Linear(2, 2)(torch.ones(1, 2)).shape == (1, 2)


@pytest.mark.parametrize(
    "settings",
    [
        {"grad_accum_steps": 0},
        {"optimizer_in_backward": True, "grad_accum_steps": 2},
        {"optimizer_in_backward": True, "max_grad_norm": 1.0},
    ],
)
def test_contradictory_loops_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidSettingError, match="at least 1|no gradient"):
        TrainingLoop(**settings)


def test_tracing_starts_neither_cuda_nor_the_network() -> None:
    script = """
import socket, sys, torch
def refuse(*_): raise AssertionError("a connection")
socket.socket.connect = refuse
torch._C._cuda_init = refuse
from trainwarden.memory.trace import TrainingLoop, trace
trace(lambda: torch.nn.Linear(4, 4), torch.zeros(1, 4), TrainingLoop())
sys.exit(torch.cuda.is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_random_numbers_are_left_alone() -> None:
    before = torch.random.get_rng_state()
    trace(lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), torch.zeros(1, 4), TrainingLoop())
    assert torch.equal(torch.random.get_rng_state(), before)
