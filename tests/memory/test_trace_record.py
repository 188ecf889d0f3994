"""Births and deaths of storages, and where they happen."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from tests.memory.networks import Stacked, ids
from trainwarden.memory import trace_record
from trainwarden.memory.trace_fake import fake_batch, on_fake_cpu
from trainwarden.memory.trace_loop import TrainingLoop
from trainwarden.memory.trace_place import Whereabouts, unit_of_name
from trainwarden.memory.trace_record import BEGINNING, Record, Recorder
from trainwarden.memory.trace_replay import Prices, rounded, timeline
from trainwarden.memory.trace_run import choose_as_on_cuda, record_steps
from trainwarden.memory.trace_shards import Sharding, prices_of


@contextmanager
def recording() -> Iterator[tuple[Recorder, Whereabouts]]:
    where = Whereabouts(nn.Module(), {})
    recorder = Recorder(where)
    with FakeTensorMode(), recorder:
        yield recorder, where


def totals(record: Record) -> list[int]:
    free = Prices(lambda stored: stored.bytes, lambda *_: {})
    return [point.total_bytes for point in timeline(record, free)]


def of_stack(depth: int = 3, *, checkpointing: bool = False, loop: TrainingLoop | None = None) -> Record:
    with torch.device("meta"):
        model = Stacked(depth=depth, checkpointing=checkpointing)
    units = {f"blocks.{n}": f"blocks.{n}" for n in range(depth)}
    return record_steps(model, ids(), loop or TrainingLoop(), units=units, device_type="cpu")


def test_a_storage_dies_with_its_last_view() -> None:
    with recording() as (recorder, _):
        tensor = torch.empty(10)
        view = tensor[2:]
        del tensor
        assert recorder.record.events == [1]
        del view
        assert recorder.record.events == [1, -1]


def test_views_and_in_place_operators_allocate_nothing() -> None:
    with recording() as (recorder, _):
        tensor = torch.zeros(4, 4)
        tensor.t().add_(1)
        tensor.view(16).mul_(2)
        assert len(recorder.record.storages) == 1


def test_inputs_and_outputs_of_an_operator_are_alive_together() -> None:
    with recording() as (recorder, _):
        x = torch.ones(256)
        x = x + 1
        x = x + 1
        del x
    assert totals(recorder.record) == [1024, 2048, 2048]


def test_outputs_of_one_operator_are_born_together() -> None:
    with recording() as (recorder, _):
        torch.sort(torch.empty(8))
    assert totals(recorder.record) == [32, 32 + 32 + 64]
    assert recorder.record.operators[1:] == ["aten.sort.default"] * 2


def test_autograd_keeps_what_it_saves() -> None:
    with recording() as (recorder, _):
        x = torch.ones(256, requires_grad=True)
        y = torch.exp(x)  # its output is saved
        z = y * 1.0
        del y
        gc.collect()
        alive = sum(1 for event in recorder.record.events if event > 0) - sum(
            1 for e in recorder.record.events if e < 0
        )
        assert alive == 3
        del z
        assert sum(recorder.record.events) == 1


@pytest.mark.parametrize(("asked", "given"), [(0, 0), (1, 512), (512, 512), (513, 1024)])
def test_cuda_granules(asked: int, given: int) -> None:
    assert rounded(asked, 512) == given


def test_a_runaway_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_record, "MAX_EVENTS", 10)
    with recording(), pytest.raises(RuntimeError, match="more than 10 allocations"):
        for _ in range(20):
            torch.empty(1)


# -- sums of gradients ------------------------------------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    """Adds up two gradients of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        one, two = grads[0].exp(), grads[0].sin()
        return one + two


class Formula(nn.Module):
    def __init__(self, formula: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16, 16))
        self.formula = formula

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.formula(x, self.weight)


@pytest.mark.parametrize(
    "formula",
    [
        lambda x, w: (x @ w).exp() * (x @ w).sin(),
        lambda x, w: functional.linear(functional.linear(x, w).relu(), w),
        lambda x, w: (x @ w).relu() @ w.t(),
        lambda x, w: (h := x @ w) + h.exp(),
        lambda x, w: (h := x @ w).exp() * h.sin(),
        lambda x, w: (h := x @ w).exp().sum() + h.sin().sum() + h.cos().sum(),
        lambda x, w: Doubled.apply(x @ w),
        lambda x, w: (h := (x @ w).exp())[:8] * h[8:],
    ],
    ids=["weight", "linear", "transposed", "residual", "twice", "thrice", "own", "slices"],
)
def test_gradients_are_added_up_in_place_where_autograd_does_so(formula: Any) -> None:
    model, x = Formula(formula), torch.zeros(16, 16)
    loss = model(x).mean()
    with torch.profiler.profile() as profile:
        loss.backward()
    real = sum(1 for event in profile.events() if event.name == "aten::add")
    with torch.device("meta"):
        model = Formula(formula)
    record = record_steps(model, x, TrainingLoop(), units={}, device_type="cpu")
    traced = [
        stored for stored, operator in zip(record.storages, record.operators, strict=True)
        if operator == "aten.add.Tensor" and stored.born.phase == "backward"
    ]  # fmt: skip
    assert len(traced) == real


@pytest.mark.parametrize(
    ("operate", "copied"),
    [
        (lambda low, high: low + high, 4 * 64),
        (lambda low, high: high * low, 4 * 64),
        (lambda low, high: high + high, 0),
        (lambda low, high: low * 2.0, 0),
        (lambda low, high: low + high[0, 0], 0),
        (lambda low, high: low.float() + high, 0),
    ],
    ids=["sum", "product", "one type", "a number", "a number of another type", "converted before"],
)
def test_the_cpu_copies_operands_of_another_type_and_cuda_does_not(operate: Any, copied: int) -> None:
    most = {}
    for on_cpu in (True, False):
        recorder = Recorder(Whereabouts(nn.Module(), {}), on_cpu=on_cpu)
        with FakeTensorMode():
            low, high = torch.zeros(8, 8, dtype=torch.bfloat16), torch.zeros(8, 8)
            with recorder:
                operate(low, high)
        most[on_cpu] = max(totals(recorder.record))
    assert most[True] - most[False] == copied


# -- where ------------------------------------------------------------------------------------------------------------


def test_phases_follow_each_other_behind_the_making_of_states() -> None:
    record = of_stack(loop=TrainingLoop(grad_accum_steps=2))
    begun = [s.born.phase for s, op in zip(record.storages, record.operators, strict=True) if op == BEGINNING]
    assert begun == ["optimizer", "forward", "backward", "forward", "backward", "optimizer"]
    made = [s for s in record.storages if s.label == "optimizer_states"]
    assert made
    assert {(s.born.phase, s.born.serial) for s in made} == {("optimizer", 1)}


def test_what_no_training_does_is_no_moment_of_it() -> None:
    """Whole gradients without a backward pass are there only while the states are made."""
    record = of_stack()
    points = list(timeline(record, prices_of(record, Sharding(), 1)))
    serials = [record.storages[point.index].born.serial for point in points]
    assert record.unlike
    assert set(serials) == {0, 2, 3, 4}, "loading, forward, backward, optimizer"


def test_where_a_parameter_gets_no_gradient_both_steps_are_traced() -> None:
    """States that were made beforehand for it would be too many."""

    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            used: torch.Tensor = self.used(x)
            return used

    with torch.device("meta"):
        model = Partly()
    record = record_steps(model, torch.zeros(4, 16), TrainingLoop(), units={}, device_type="cpu")
    states = sum(s.bytes for s in record.storages if s.label == "optimizer_states")
    assert states == 2 * 4 * (16 * 16 + 16) + 2 * 4, "two moments and a counter for each used parameter"
    begun = [s.born.phase for s, op in zip(record.storages, record.operators, strict=True) if op == BEGINNING]
    assert begun == ["forward", "backward", "optimizer"] * 2


def test_every_operator_of_a_block_is_known_to_be_its() -> None:
    record = of_stack()
    relus = [s.born for s, op in zip(record.storages, record.operators, strict=True) if op == "aten.relu.default"]
    assert [(m.unit, m.module) for m in relus] == [(f"blocks.{n}", f"blocks.{n}") for n in (0, 1, 2)]
    linears = [s.born.module for s, op in zip(record.storages, record.operators, strict=True) if "addmm" in op]
    assert linears[:2] == ["blocks.0.up", "blocks.0.down"]


def test_the_backward_pass_of_a_block_is_known_by_its_autograd_nodes() -> None:
    record = of_stack()
    thresholds = [
        s.born for s, op in zip(record.storages, record.operators, strict=True) if op.startswith("aten.threshold_backw")
    ]
    assert [m.unit for m in thresholds] == ["blocks.2", "blocks.1", "blocks.0"]
    assert not any(m.recomputing for m in thresholds)


def test_what_lies_behind_the_blocks_is_known_to() -> None:
    record = of_stack()
    losses = [s.born for s, op in zip(record.storages, record.operators, strict=True) if "softmax" in op]
    assert {(m.unit, m.after) for m in losses} == {("", "blocks.2")}


def test_recomputing_is_told_from_the_backward_pass() -> None:
    record = of_stack(checkpointing=True)
    relus = [s.born for s, op in zip(record.storages, record.operators, strict=True) if op == "aten.relu.default"]
    assert [(m.phase, m.unit, m.recomputing) for m in relus[:6]] == [
        *(("forward", f"blocks.{n}", False) for n in (0, 1, 2)),
        *(("backward", f"blocks.{n}", True) for n in (2, 1, 0)),
    ]


def test_a_loop_of_an_optimizer_is_followed_from_block_to_block() -> None:
    record = of_stack(loop=TrainingLoop(make_optimizer=lambda p: torch.optim.AdamW(p, foreach=False)))
    roots = [
        s.born.unit
        for s, op in zip(record.storages, record.operators, strict=True)
        if op == "aten.sqrt.default" and s.born.phase == "optimizer"
    ]
    per_step = ["", *(f"blocks.{n}" for n in (0, 1, 2) for _ in range(4)), "", ""]  # between embedding and head
    assert roots == per_step * 2


def test_labels_outlive_the_step() -> None:
    record = of_stack()
    labels = {s.label for s in record.storages}
    assert labels == {"weights", "batch", "gradients", "optimizer_states", None}
    weights = sum(s.bytes for s in record.storages if s.label == "weights")
    gradients = sum(s.bytes for s in record.storages if s.label == "gradients")
    assert gradients == weights


@pytest.mark.parametrize(
    ("name", "unit"),
    [("layers.1.mlp.weight", "layers.1"), ("layers.10.mlp", "layers.10"), ("layers.1", "layers.1"), ("head", "")],
)
def test_names_lie_in_units_by_whole_parts(name: str, unit: str) -> None:
    assert unit_of_name(name, {"layers.1": "layers.1", "layers.10": "layers.10"}) == unit


# -- onto fake tensors and back ---------------------------------------------------------------------------------------


def test_a_model_comes_back_from_the_fake_device_as_it_was() -> None:
    with torch.device("meta"):
        model = Stacked()
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    with on_fake_cpu(model, FakeTensorMode()):
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        model.cache = next(model.parameters()).detach()
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert not hasattr(model, "cache")


def test_batches_keep_their_nesting_types_and_aliases() -> None:
    tensor = torch.zeros(2, 3, dtype=torch.float16)
    fake = fake_batch({"a": tensor, "b": [tensor, 1, None]}, FakeTensorMode())
    assert fake["a"] is fake["b"][0]
    assert (fake["a"].dtype, fake["a"].shape, fake["b"][1:]) == (torch.float16, (2, 3), [1, None])


def test_only_what_was_left_open_is_chosen_for_cuda() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    for told, chosen in (({}, True), ({"foreach": False}, False), ({"fused": True}, None)):
        optimizer = torch.optim.AdamW([parameter], **told)
        choose_as_on_cuda(optimizer)
        assert optimizer.param_groups[0]["foreach"] is chosen
