"""A step that runs out of memory is finished in smaller micro-batches: same samples, gradients and schedule."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import weakref
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from tests.runtime.loops import ComputeLoss, Loop, Rows, distance, small_model
from tests.waiting import LIMIT_S
from trainwarden import Guard, rows, shifted_target_tokens, target_tokens
from trainwarden.errors import GPUMemoryError, SplitRefusedError
from trainwarden.events import MicroBatchShrunk
from trainwarden.testing import MemoryCeiling, out_of_memory_error


def ceiling(rows: int, from_step: int = 1, **options: Any) -> Any:
    def disturb(compute_loss: ComputeLoss, guard: Guard) -> ComputeLoss:
        fault = MemoryCeiling(rows, from_step=from_step, steps_completed=lambda: guard.steps_completed, **options)
        disturb.fault = fault  # type: ignore[attr-defined]
        return fault(compute_loss)

    return disturb


def test_a_batch_of_8_that_fits_at_4_from_step_7_trains_every_sample_once(tmp_path: Path) -> None:
    undisturbed = Loop(tmp_path / "undisturbed").run()
    disturb = ceiling(4, from_step=7)
    data = Rows()
    loop = Loop(tmp_path / "disturbed", disturb=disturb, loader=DataLoader(data, batch_size=8, shuffle=True)).run()

    assert Counter(data.loaded) == Counter(range(80)), "every sample is loaded exactly once"
    assert disturb.fault.samples == 80 + 8, "only the failed attempt is run again"
    assert loop.guard.steps_completed == 10
    assert loop.learning_rates == undisturbed.learning_rates
    assert loop.losses == pytest.approx(undisturbed.losses, rel=1e-5)
    assert distance(loop.weights(), undisturbed.weights()) < 1e-5
    (shrink,) = loop.named(MicroBatchShrunk)
    assert (shrink.step, shrink.from_size, shrink.to_size) == (6, 8, 4)
    assert loop.guard.micro_batch_size == 4


def test_a_run_that_never_runs_out_of_memory_is_bit_identical_to_one_without_a_guard(tmp_path: Path) -> None:
    guarded = Loop(tmp_path, dropout=0.3).run()
    model = small_model(dropout=0.3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=10)
    torch.manual_seed(11)
    for inputs, targets in DataLoader(Rows(), batch_size=8, shuffle=True):
        functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    bare = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert torch.equal(guarded.weights(), bare)


@pytest.fixture
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Loop]:
    """The run that nothing happens to, by batch size."""
    return cache(lambda batch_size: Loop(tmp_path_factory.mktemp("a"), batch_size=batch_size).run())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fits=st.integers(1, 7),
    from_step=st.integers(1, 10),
    phase=st.sampled_from(["forward", "backward"]),
    batch_size=st.integers(8, 13),
)
def test_wherever_it_strikes_the_weights_end_where_they_would_have(
    tmp_path_factory: pytest.TempPathFactory,
    undisturbed: Callable[[int], Loop],
    fits: int,
    from_step: int,
    phase: Literal["forward", "backward"],
    batch_size: int,
) -> None:
    loop = Loop(
        tmp_path_factory.mktemp("b"),
        batch_size=batch_size,
        disturb=ceiling(fits, from_step, phase=phase),
        guard_options={"max_shrinks": 4},
    ).run()
    expected = undisturbed(batch_size)
    assert distance(loop.weights(), expected.weights()) < 1e-5
    assert loop.learning_rates == expected.learning_rates
    assert loop.guard.micro_batch_size is None or loop.guard.micro_batch_size <= fits


def test_when_one_row_does_not_fit_the_error_says_so_and_the_weights_are_those_of_the_last_step(
    tmp_path: Path,
) -> None:
    before = Loop(tmp_path / "a", max_steps=5).run()
    loop = Loop(
        tmp_path / "b",
        disturb=ceiling(0, from_step=6),
        guard_options={"max_shrinks": 9, "checkpoint_every_steps": 2},
    )
    with pytest.raises(GPUMemoryError) as caught:
        loop.run()
    error = caught.value
    assert error.code == "RUNTIME_GPU_OOM"
    assert error.exit_code == 81
    assert error.steps_completed == 5
    assert error.checkpoint_path is not None
    assert error.checkpoint_path.endswith("step-00000004")
    assert error.details["micro_batch_size"] == 1
    assert error.details["phase"] == "forward"
    assert error.details["requested_bytes"] == 2 * 2**30
    assert isinstance(error.__cause__, torch.OutOfMemoryError)
    assert torch.equal(loop.weights(), before.weights())


def test_a_step_shrinks_at_most_max_shrinks_times(tmp_path: Path) -> None:
    loop = Loop(tmp_path, batch_size=64, disturb=ceiling(4))
    with pytest.raises(GPUMemoryError, match="max_shrinks") as caught:
        loop.run()
    assert [e.to_size for e in loop.named(MicroBatchShrunk)] == [32, 16, 8]
    assert caught.value.details["shrinks"] == 3


def test_the_budget_of_shrinks_is_one_steps_not_the_runs(tmp_path: Path) -> None:
    def disturb(compute_loss: ComputeLoss, guard: Guard) -> ComputeLoss:
        def limited(batch: Any) -> torch.Tensor:
            fits = max(1, 8 - guard.steps_completed)
            return MemoryCeiling(fits)(compute_loss)(batch)

        return limited

    loop = Loop(tmp_path, disturb=disturb, guard_options={"max_shrinks": 1}).run()
    assert [e.to_size for e in loop.named(MicroBatchShrunk)] == [4, 2, 1]


def test_recovery_can_be_switched_off_and_the_error_is_still_typed(tmp_path: Path) -> None:
    with pytest.raises(GPUMemoryError, match="oom_recovery=False"):
        Loop(tmp_path, disturb=ceiling(4), guard_options={"oom_recovery": False}).run()


def test_other_errors_pass_through_untouched(tmp_path: Path) -> None:
    def disturb(compute_loss: ComputeLoss, guard: Guard) -> ComputeLoss:
        def broken(batch: Any) -> torch.Tensor:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

        return broken

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        Loop(tmp_path, disturb=disturb).run()


def test_activations_of_the_failed_attempt_are_gone_before_the_retry(tmp_path: Path) -> None:
    alive_at_retry: list[bool] = []
    held: list[weakref.ref[torch.Tensor]] = []

    def disturb(compute_loss: ComputeLoss, guard: Guard) -> ComputeLoss:
        def limited(batch: Any) -> torch.Tensor:
            activation = torch.zeros(1000)  # a local of the failing frame, as activations are
            if len(batch[0]) > 4:
                held.append(weakref.ref(activation))
                raise out_of_memory_error()
            alive_at_retry.extend(ref() is not None for ref in held)
            return compute_loss(batch)

        return limited

    gc.disable()
    try:
        Loop(tmp_path, max_steps=1, disturb=disturb).run()
    finally:
        gc.enable()
    assert alive_at_retry
    assert not any(alive_at_retry)


# -- gradients that are already there ----------------------------------------------------------------------------


class Reached(torch.autograd.Function):
    """Identity that runs out of memory in backward, after the layers above it have accumulated their gradients."""

    armed = False

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        if Reached.armed and len(gradients[0]) > 3:
            raise out_of_memory_error()
        return gradients[0]


class Halfway(nn.Module):
    """Backward fails between its two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.below, self.above = nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = Reached.apply(torch.tanh(self.below(x)))
        return self.above(hidden)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_of_earlier_backward_calls_survive_a_backward_that_fails_halfway(
    tmp_path: Path, set_to_none: bool
) -> None:
    """Two batches are accumulated in one step; the second fails after it has reached the upper layer only."""

    def gradients(run_dir: Path, fail: bool) -> list[torch.Tensor]:
        model = Halfway()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        guard = Guard(run_dir, observers=[])
        found: list[torch.Tensor] = []
        with guard.watch(model=model, optimizer=optimizer):
            for index, (x, y) in enumerate(guard.batches(DataLoader(Rows(16), batch_size=8), max_steps=1)):
                Reached.armed = fail and index == 1
                guard.backward(lambda b: functional.mse_loss(model(b[0]), b[1]) / 2, (x, y))
                Reached.armed = False
                if index % 2:
                    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=set_to_none)
        return found

    undisturbed = gradients(tmp_path / "a", fail=False)
    recovered = gradients(tmp_path / "b", fail=True)
    for ours, theirs in zip(recovered, undisturbed, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_accumulating_twice_into_one_leaf_raises_its_gradients_version() -> None:
    """The contract with torch that recovery builds on: a version counter tells which leaves a backward has reached."""
    layer = nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    gradient, version = layer.weight.grad, layer.weight.grad._version
    layer(torch.ones(1, 2)).sum().backward()
    assert layer.weight.grad is gradient
    assert gradient._version == version + 1


# -- means over something else than rows -------------------------------------------------------------------------

VOCABULARY = 11


def padded_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (8, 10), generator=generator)
    labels = tokens.clone()
    for row, length in enumerate([10, 9, 8, 8, 7, 6, 5, 3]):  # 30 % padding
        labels[row, length:] = -100
    return {"tokens": tokens, "labels": labels}


class TokenModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed, self.head = nn.Embedding(VOCABULARY, 12), nn.Linear(12, VOCABULARY)
        with torch.no_grad():
            self.embed.weight.mul_(3)  # losses that differ from token to token

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = self.head(torch.tanh(self.embed(batch["tokens"])))
        return functional.cross_entropy(logits.flatten(0, 1).double(), batch["labels"].flatten())


def token_gradient(run_dir: Path, fits: int, **backward_options: Any) -> torch.Tensor:
    model = TokenModel().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = Guard(run_dir, observers=[])
    with guard.watch(model=model, optimizer=optimizer):
        guard._progress.plan.limit = fits if fits < 8 else None
        for batch in guard.batches([padded_batch()], max_steps=1):
            guard.backward(model.loss, batch, **backward_options)
            gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
            optimizer.step()
    return gradient


def test_a_token_mean_split_into_3_3_2_gives_the_undivided_gradient(tmp_path: Path) -> None:
    undivided = token_gradient(tmp_path / "a", fits=8)
    split = token_gradient(tmp_path / "b", fits=3, weight=target_tokens)
    assert distance(split, undivided) < 1e-6


def test_the_same_split_weighed_by_rows_is_refused_before_it_can_go_wrong(tmp_path: Path) -> None:
    with pytest.raises(SplitRefusedError, match="weight=trainwarden.target_tokens") as caught:
        token_gradient(tmp_path, fits=3)
    assert "labels" in str(caught.value)


def test_saying_rows_where_tokens_are_meant_is_exposed_by_the_first_split(tmp_path: Path) -> None:
    with pytest.raises(SplitRefusedError, match="weighted parts"):
        token_gradient(tmp_path, fits=3, weight=rows)


def test_shifted_targets_leave_out_the_first_token_of_each_row() -> None:
    batch = padded_batch()
    assert target_tokens(batch) - shifted_target_tokens(batch) == 8


def test_a_part_without_any_target_adds_nothing(tmp_path: Path) -> None:
    batch = padded_batch()
    batch["labels"][4:] = -100
    model = TokenModel().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = Guard(tmp_path, observers=[])
    with guard.watch(model=model, optimizer=optimizer):
        guard._progress.plan.limit = 4
        for part in guard.batches([batch], max_steps=1):
            loss = guard.backward(model.loss, part, weight=target_tokens)
            optimizer.step()
    assert loss.item() == pytest.approx(TokenModel().double().loss(batch).item(), rel=1e-9)
    assert guard.steps_skipped == 0


# -- what must not be split --------------------------------------------------------------------------------------


def one_step(run_dir: Path, model: nn.Module, compute_loss: ComputeLoss, batch: Any, **options: Any) -> Guard:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = Guard(run_dir, observers=[], **options)
    with guard.watch(model=model, optimizer=optimizer):
        for one in guard.batches([batch], max_steps=1):
            guard.backward(compute_loss, one)
            optimizer.step()
    return guard


def contrastive(model: nn.Module) -> ComputeLoss:
    def loss(batch: torch.Tensor) -> torch.Tensor:
        codes = functional.normalize(model(batch), dim=1)
        return functional.cross_entropy(codes @ codes.T / 0.5, torch.arange(len(batch)))

    return loss


def test_a_contrastive_loss_is_exposed_at_its_first_split_and_runs_unhindered_without_one(
    tmp_path: Path,
) -> None:
    model, batch = nn.Linear(6, 4), torch.randn(8, 6)
    one_step(tmp_path / "a", model, contrastive(model), batch)
    with pytest.raises(SplitRefusedError, match="contrastive") as caught:
        one_step(tmp_path / "b", model, MemoryCeiling(4)(contrastive(model)), batch)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_a_summed_loss_is_exposed(tmp_path: Path) -> None:
    model, batch = nn.Linear(6, 1), torch.randn(8, 6)
    with pytest.raises(SplitRefusedError, match="summed"):
        one_step(tmp_path, model, MemoryCeiling(4)(lambda b: model(b).square().sum()), batch)


def test_batch_norm_is_exposed_by_name_and_its_statistics_stay_as_they_were(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    batch = torch.randn(8, 6)
    one_step(tmp_path / "a", model, lambda b: model(b).square().mean(), batch)
    seen = int(model[1].num_batches_tracked)
    with pytest.raises(SplitRefusedError, match=r"1 \(BatchNorm1d\)"):
        one_step(tmp_path / "b", model, MemoryCeiling(4)(lambda b: model(b).square().mean()), batch)
    assert int(model[1].num_batches_tracked) == seen


def test_batch_norm_in_evaluation_mode_may_be_split(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).eval()
    guard = one_step(tmp_path, model, MemoryCeiling(4)(lambda b: model(b).square().mean()), torch.randn(8, 6))
    assert guard.micro_batch_size == 4


def test_dropout_does_not_make_a_sound_loss_look_unsound(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Linear(6, 32),
        nn.Dropout(0.5),
        nn.TransformerEncoderLayer(32, 4, 16, dropout=0.5, batch_first=True),
    )
    batch = torch.randn(8, 5, 6)
    guard = one_step(tmp_path, model, MemoryCeiling(4)(lambda b: model(b).square().mean()), batch)
    assert guard.micro_batch_size == 4


def test_a_loss_that_draws_noise_is_judged_by_its_own_spread(tmp_path: Path) -> None:
    model, batch = nn.Linear(6, 6), torch.randn(8, 6)
    torch.manual_seed(0)

    def denoising(b: torch.Tensor) -> torch.Tensor:
        return functional.mse_loss(model(b + torch.randn_like(b)), b)

    assert one_step(tmp_path / "a", model, MemoryCeiling(4)(denoising), batch).micro_batch_size == 4
    with pytest.raises(SplitRefusedError):
        one_step(tmp_path / "b", model, MemoryCeiling(4)(lambda b: denoising(b) * len(b)), batch)


def test_trust_declares_that_a_loss_splits(tmp_path: Path) -> None:
    model, batch = nn.Linear(6, 4), torch.randn(8, 6)
    guard = one_step(tmp_path, model, MemoryCeiling(4)(contrastive(model)), batch, split_check="trust")
    assert guard.micro_batch_size == 4


def test_the_check_leaves_the_random_stream_as_it_was(tmp_path: Path) -> None:
    def draws(run_dir: Path, check: str) -> torch.Tensor:
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        one_step(
            run_dir,
            model,
            MemoryCeiling(4)(lambda b: model(b).square().mean()),
            torch.ones(8, 6),
            split_check=check,
        )
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()] + [torch.rand(3)])

    assert torch.equal(draws(tmp_path / "a", "verify"), draws(tmp_path / "b", "trust"))


# -- batches that are not tensors --------------------------------------------------------------------------------


class Graphs:
    """A batch without a row dimension, as graph libraries have them."""

    def __init__(self, graphs: list[torch.Tensor]) -> None:
        self.graphs = graphs


def test_split_cuts_what_the_guard_cannot(tmp_path: Path) -> None:
    model = nn.Linear(6, 1)
    batch = Graphs([torch.randn(n, 6) for n in (3, 1, 4, 1, 5)])

    def loss(b: Graphs) -> torch.Tensor:
        if len(b.graphs) > 2:
            raise out_of_memory_error()
        return torch.stack([model(g).square().mean() for g in b.graphs]).mean()

    def cut(b: Graphs, max_rows: int) -> list[Graphs]:
        return [Graphs(b.graphs[i : i + max_rows]) for i in range(0, len(b.graphs), max_rows)]

    guard = one_step(tmp_path, model, loss, batch, split=cut)
    assert guard.micro_batch_size == 2


def test_without_split_such_a_batch_is_refused_only_when_a_split_is_needed(tmp_path: Path) -> None:
    model = nn.Linear(6, 1)
    batch = Graphs([torch.randn(2, 6)])
    one_step(tmp_path / "a", model, lambda b: model(b.graphs[0]).square().mean(), batch)

    def fails(b: Graphs) -> torch.Tensor:
        raise out_of_memory_error()

    with pytest.raises(SplitRefusedError, match="split="):
        one_step(tmp_path / "b", model, fails, batch)


# -- a real allocator --------------------------------------------------------------------------------------------


def test_a_real_allocator_failure_is_recovered(tmp_path: Path) -> None:
    """The process may not map more than its present size plus what half a batch needs: malloc itself says no."""
    script = textwrap.dedent(
        """
        import resource, sys, torch
        from torch import nn
        from trainwarden import Guard
        torch.set_num_threads(1)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        rows, megabytes = 1 << 16, 1 << 20
        data = [torch.randn(rows, 64) for _ in range(4)]

        def compute_loss(batch):
            return (model(batch) ** 2).mean()

        compute_loss(data[0][:64]).backward()   # warm up whatever allocates once
        optimizer.zero_grad()
        guard = Guard(sys.argv[1], checkpoint_every_s=None)
        with guard.watch(model=model, optimizer=optimizer):
            for index, batch in enumerate(guard.batches(data, max_steps=4)):
                if index == 1:
                    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
                    limit = used + 40 * megabytes
                    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
                guard.backward(compute_loss, batch)
                optimizer.step()
                optimizer.zero_grad()
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print("steps", guard.steps_completed, "shrinks", guard.shrinks, "micro", guard.micro_batch_size)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        # Every tensor is mapped by itself and unmapped when freed, so that the size now is what is in use.
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert words[1] == "4"
    assert int(words[3]) >= 1, "the limit must have bitten"
    assert "out of memory" in done.stderr
    assert "DefaultCPUAllocator" in done.stderr
