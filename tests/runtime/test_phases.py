"""Every phase of a run that can run out of memory, and what becomes of the run."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import textwrap
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from tests.runtime.loops import Rows, distance, small_model
from trainwarden import Guard, target_tokens
from trainwarden.device import GpuProcess, Unknown
from trainwarden.errors import GPUMemoryError, InvalidSettingError, SplitRefusedError
from trainwarden.events import EvaluationShrunk, Event, Notice
from trainwarden.runtime import backward, evaluation, optimizer_step, phases
from trainwarden.runtime.shortage import Shortage, foreign_process
from trainwarden.testing import FailingAllocation, MemoryCeiling, out_of_memory_error

# -- the product: phase x step x optimizer x place -------------------------------------------------------------------


@pytest.fixture
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without collecting garbage before each of many attempts; what is injected takes no memory."""
    for module in (backward, evaluation, optimizer_step, phases):
        monkeypatch.setattr(module, "release_memory", lambda: None)


PHASES = ("forward", "backward", "clipping", "optimizer step", "evaluation")
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=False),
    "SGD, foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, foreach=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.01),
}
STEPS = 5


class Whole:
    """A loop with every phase; in one of them, at one step, memory runs out at the given place."""

    def __init__(self, run_dir: Path, optimizer: str, phase: str = "", at_step: int = 0, place: int = 1) -> None:
        self.optimizer_name, self.phase, self.at_step, self.place = optimizer, phase, at_step, place
        self.data = Rows(STEPS * 8)
        self.events: list[Event] = []
        self.evaluations: list[Any] = []
        self.guard = Guard(run_dir, observers=[self.events.append], max_shrinks=4, checkpoint_every_s=None)
        self.model = small_model()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.allocation = FailingAllocation(place)
        self.ceiling = MemoryCeiling(
            place,
            from_step=at_step + 1,
            phase="backward" if phase == "backward" else "forward",
            steps_completed=lambda: self.guard.steps_completed,
        )

    @property
    def struck(self) -> int:
        return self.allocation.struck + self.ceiling.struck

    def fault(self, phase: str) -> Any:
        here = phase == self.phase and self.guard.steps_completed == self.at_step
        return self.allocation if here else nullcontext()

    def loss(self, batch: Any) -> Tensor:
        return functional.mse_loss(self.model(batch[0]), batch[1])

    def score(self, batch: Any) -> Tensor:
        with self.fault("evaluation"):
            return self.loss(batch)

    def run(self) -> Whole:
        torch.manual_seed(11)
        limited = self.ceiling(self.loss) if self.phase in ("forward", "backward") else self.loss
        loader = DataLoader(self.data, batch_size=8, shuffle=True)
        guard, optimizer = self.guard, self.optimizer
        held_back = [tuple(torch.ones(8, n) * (i + 1) for n in (6, 1)) for i in range(2)]
        with guard.watch(model=self.model, optimizer=optimizer):
            for batch in guard.batches(loader, max_steps=STEPS):
                self.evaluations.append(guard.evaluate(self.score, held_back))
                guard.backward(limited, batch)
                with self.fault("clipping"):
                    guard.clip_grad_norm_(self.model.parameters(), 0.5)
                with self.fault("optimizer step"):
                    optimizer.step()
                optimizer.zero_grad()
        return self

    def weights(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])


_undisturbed: dict[str, Whole] = {}


def check_recovered(folder: Path, optimizer: str, phase: str, at_step: int, place: int) -> bool:
    """Runs into the failure and compares with the undisturbed run. False: there is no such place."""
    if optimizer not in _undisturbed:
        _undisturbed[optimizer] = Whole(folder / "undisturbed", optimizer).run()
    reference = _undisturbed[optimizer]
    run = Whole(folder / "disturbed", optimizer, phase, at_step, place).run()
    if not run.struck:
        return False
    if phase in ("forward", "backward"):
        assert distance(run.weights(), reference.weights()) < (5e-5 if optimizer == "Adafactor" else 1e-5)
    else:
        assert torch.equal(run.weights(), reference.weights())
    assert run.evaluations == pytest.approx(reference.evaluations, rel=1e-5)
    assert Counter(run.data.loaded) == Counter(range(STEPS * 8)), "each sample is loaded once"
    counted = {float(state["step"]) for state in run.optimizer.state.values() if "step" in state}
    assert counted <= {float(STEPS)}, "no parameter is updated twice or left out"
    assert (run.guard.steps_completed, run.guard.steps_skipped) == (STEPS, 0)
    return True


@pytest.mark.usefixtures("_hasty")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    phase=st.sampled_from(PHASES),
    at_step=st.sampled_from([0, 3]),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    place=st.integers(1, 7),
)
def test_wherever_memory_runs_out_the_run_ends_where_it_would_have(
    tmp_path_factory: pytest.TempPathFactory, phase: str, at_step: int, optimizer: str, place: int
) -> None:
    check_recovered(tmp_path_factory.mktemp("run"), optimizer, phase, at_step, place)


@pytest.mark.torture
@pytest.mark.usefixtures("_hasty")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_whole_product(tmp_path_factory: pytest.TempPathFactory, optimizer: str) -> None:
    recovered: Counter[str] = Counter()
    for phase, at_step in itertools.product(PHASES, (0, 3)):
        places: Iterator[int] = itertools.count(1) if phase not in ("forward", "backward") else iter(range(1, 8))
        for place in places:
            if not check_recovered(tmp_path_factory.mktemp("run"), optimizer, phase, at_step, place):
                break
            recovered[phase] += 1
    print(optimizer, dict(recovered))
    assert set(recovered) >= set(PHASES) - {"optimizer step"}


# -- loading ---------------------------------------------------------------------------------------------------------


def guarded(run_dir: Path, **options: Any) -> tuple[Guard, list[Event]]:
    events: list[Event] = []
    return Guard(run_dir, observers=[events.append], **options), events


def test_loading_is_tried_again_after_the_first_attempts_memory_is_gone(tmp_path: Path) -> None:
    guard, events = guarded(tmp_path)
    first: list[weakref.ref[Tensor]] = []

    def load() -> Tensor:
        half_a_model = torch.randn(5)
        if not first:
            first.append(weakref.ref(half_a_model))
            raise out_of_memory_error()
        assert first[0]() is None
        return half_a_model

    torch.manual_seed(3)
    expected = torch.randn(5)
    torch.manual_seed(3)
    gc.disable()
    try:
        loaded = guard.attempt("load", load)
    finally:
        gc.enable()
    assert torch.equal(loaded, expected), "the same random numbers as if the first attempt had come through"
    (notice,) = events
    assert "out of memory in load" in str(notice)


def test_loading_that_never_fits_is_typed_and_says_how_much_was_missing(tmp_path: Path) -> None:
    guard, _ = guarded(tmp_path)
    calls: list[int] = []

    def load() -> None:
        calls.append(1)
        raise out_of_memory_error(requested_bytes=3 * 2**30, free_bytes=2**30)

    with pytest.raises(GPUMemoryError, match=r"memory ran out in load: again after memory was released") as caught:
        guard.attempt("load", load)
    assert len(calls) == 2
    assert caught.value.details["requested_bytes"] == 3 * 2**30
    assert caught.value.details["free_bytes"] == 2**30
    assert caught.value.details["would_fit"] == "2,048.0 MiB more"
    assert caught.value.message.endswith("2,048.0 MiB more would do")


def test_loading_is_tried_once_without_recovery_and_other_errors_pass(tmp_path: Path) -> None:
    guard, events = guarded(tmp_path, oom_recovery=False)

    def load() -> None:
        raise MemoryError

    with pytest.raises(GPUMemoryError, match="oom_recovery=False"):
        guard.attempt("load", load)

    def missing() -> None:
        raise FileNotFoundError("model.safetensors")

    with pytest.raises(FileNotFoundError):
        guard.attempt("load", missing)
    assert guard.attempt("load", lambda: None) is None
    assert events == []


# -- clipping --------------------------------------------------------------------------------------------------------


def with_gradients(*kinds: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for kind in kinds:
        parameter = nn.Parameter(torch.zeros(5, dtype=kind))
        parameter.grad = torch.randn(5, generator=generator).to(kind) * 3
        made.append(parameter)
    return made


@pytest.mark.usefixtures("_hasty")
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("norm_type", [2.0, float("inf"), 1.0])
def test_clipping_is_torchs_own_at_whatever_allocation_it_fails(
    tmp_path: Path, foreach: bool | None, norm_type: float
) -> None:
    guard, _ = guarded(tmp_path)
    kinds = (torch.float32, torch.bfloat16, torch.float32)
    theirs = with_gradients(*kinds)
    norm = torch.nn.utils.clip_grad_norm_(theirs, 0.7, norm_type, foreach=foreach)
    for at in itertools.count():
        ours = with_gradients(*kinds)
        with FailingAllocation(at) as fault:
            found = guard.clip_grad_norm_(iter(ours), 0.7, norm_type, foreach=foreach)
        assert torch.equal(found, norm), at
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True)), at  # type: ignore[arg-type]
        if at and not fault.struck:
            break
    assert at > 4


def test_one_tensor_and_nothing_at_all_can_be_clipped(tmp_path: Path) -> None:
    guard, _ = guarded(tmp_path)
    (parameter,) = with_gradients(torch.float32)
    assert guard.clip_grad_norm_(parameter, 0.5) > 0.5
    assert float(parameter.grad.norm()) == pytest.approx(0.5, rel=1e-4)  # type: ignore[union-attr]
    assert guard.clip_grad_norm_([nn.Parameter(torch.ones(2))], 0.5) == 0.0


def test_a_norm_that_is_not_finite_is_an_error_only_on_request(tmp_path: Path) -> None:
    guard, _ = guarded(tmp_path)
    (parameter,) = with_gradients(torch.float32)
    parameter.grad.fill_(float("nan"))  # type: ignore[union-attr]
    assert guard.clip_grad_norm_([parameter], 1.0).isnan()
    with pytest.raises(RuntimeError, match="non-finite"):
        guard.clip_grad_norm_([parameter], 1.0, error_if_nonfinite=True)


def test_clipping_that_never_fits_is_a_typed_error(tmp_path: Path) -> None:
    guard, _ = guarded(tmp_path)
    made = with_gradients(torch.float32)
    with FailingAllocation(1, times=99), pytest.raises(GPUMemoryError, match="gradient clipping"):
        guard.clip_grad_norm_(made, 1.0)


def test_a_real_allocator_failure_in_clipping_is_recovered(tmp_path: Path) -> None:
    """A gradient that is still to be conjugated is copied for its norm; a cycle of garbage holds what that needs."""
    script = textwrap.dedent(
        """
        import gc, resource, sys, torch
        from trainwarden import Guard
        torch.set_num_threads(1)
        parameter = torch.nn.Parameter(torch.zeros(1 << 22, dtype=torch.complex64))
        def gradient():
            return torch.full_like(parameter, 0.5 + 1j).conj()
        parameter.grad = gradient()
        expected = torch.nn.utils.clip_grad_norm_([parameter], 1.0, foreach=False)
        clipped, parameter.grad = parameter.grad, gradient()
        gc.disable()
        cycle = [torch.empty(80 << 20, dtype=torch.uint8)]
        cycle.append(cycle)
        del cycle
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), resource.RLIM_INFINITY))
        norm = Guard(sys.argv[1]).clip_grad_norm_([parameter], 1.0, foreach=False)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(torch.equal(norm, expected), torch.equal(parameter.grad, clipped))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True"]
    assert "out of memory in gradient clipping" in done.stderr
    assert "DefaultCPUAllocator" in done.stderr


# -- evaluation ------------------------------------------------------------------------------------------------------


class Evaluated:
    """A guard in its watch, over a model whose second module is frozen in evaluation mode."""

    def __init__(self, run_dir: Path, **options: Any) -> None:
        self.guard, self.events = guarded(run_dir, **options)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.model[1].eval()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def __call__(self, fn: Any, loader: Any, **options: Any) -> Any:
        with self.guard.watch(model=self.model, optimizer=self.optimizer):
            return self.guard.evaluate(fn, loader, **options)

    def shrinks(self) -> list[tuple[int, int]]:
        return [(e.from_size, e.to_size) for e in self.events if isinstance(e, EvaluationShrunk)]


VALUES = [torch.arange(1.0, n + 1).reshape(-1, 1) * (n + 1) for n in (5, 8, 3)]
MEAN = float(torch.cat(VALUES).mean())


def fitting(rows: int, fn: Any = lambda batch: batch.mean()) -> Any:
    def limited(batch: Any) -> Any:
        if len(batch) > rows:
            raise out_of_memory_error()
        return fn(batch)

    return limited


@pytest.mark.usefixtures("_hasty")
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
def test_an_evaluation_is_the_mean_over_all_rows_in_whatever_parts(tmp_path: Path, rows: int) -> None:
    evaluate = Evaluated(tmp_path)
    assert evaluate(fitting(rows), VALUES) == pytest.approx(MEAN, rel=1e-12)
    assert bool(evaluate.shrinks()) == (rows < 8)
    assert all(after == -(-before // 2) for before, after in evaluate.shrinks())


def test_the_first_remedy_is_to_release_what_training_has_cached(tmp_path: Path) -> None:
    evaluate, failures = Evaluated(tmp_path), iter([True])

    def once(batch: Tensor) -> Tensor:
        if next(failures, False):
            raise out_of_memory_error()
        return batch.mean()

    assert evaluate(once, VALUES) == pytest.approx(MEAN)
    assert evaluate.shrinks() == []


@pytest.mark.usefixtures("_hasty")
def test_the_size_that_fits_is_remembered_and_is_not_trainings(tmp_path: Path) -> None:
    evaluate = Evaluated(tmp_path)
    guard, seen = evaluate.guard, []

    def watched(batch: Tensor) -> Tensor:
        seen.append(len(batch))
        return fitting(3)(batch)

    with guard.watch(model=evaluate.model, optimizer=evaluate.optimizer):
        guard.evaluate(watched, VALUES)
        seen.clear()
        guard.evaluate(watched, VALUES)
        assert max(seen) <= 3
        assert guard.micro_batch_size is None
    assert evaluate.shrinks() == [(5, 3)]


def test_several_means_at_once_and_numbers_are_returned_by_name(tmp_path: Path) -> None:
    def scores(batch: Tensor) -> dict[str, Any]:
        return {"mean": batch.mean(), "share": float((batch > 9).double().mean())}

    found = Evaluated(tmp_path)(fitting(4, scores), VALUES)
    everything = torch.cat(VALUES)
    assert found == pytest.approx({"mean": MEAN, "share": float((everything > 9).double().mean())}, rel=1e-6)


@pytest.mark.usefixtures("_hasty")
def test_a_token_mean_is_weighed_by_its_targets(tmp_path: Path) -> None:
    labels = torch.tensor([[1, 2, -100], [3, -100, -100], [4, 5, 6], [-100, -100, -100]])

    def token_mean(batch: dict[str, Tensor]) -> Tensor:
        chosen = batch["labels"][batch["labels"] != -100]
        return chosen.double().mean()

    batches = [{"labels": labels}, {"labels": labels[:1]}]
    evaluate = Evaluated(tmp_path)
    limited = MemoryCeiling(1)  # counts under grad only: evaluation is not its business
    assert evaluate(limited(token_mean), batches, weight=target_tokens) == pytest.approx(24 / 8)

    def one_by_one(batch: dict[str, Tensor]) -> Tensor:
        if len(batch["labels"]) > 1:
            raise out_of_memory_error()
        return token_mean(batch)

    assert Evaluated(tmp_path / "b")(one_by_one, batches, weight=target_tokens) == pytest.approx(24 / 8)
    with pytest.raises(SplitRefusedError, match="weight="):
        Evaluated(tmp_path / "c")(one_by_one, batches)


@pytest.mark.parametrize("fails", [False, True])
def test_modes_gradients_and_random_streams_are_as_before(tmp_path: Path, fails: bool) -> None:
    evaluate = Evaluated(tmp_path)

    def score(batch: Tensor) -> Tensor:
        assert not any(module.training for module in evaluate.model.modules())
        assert not torch.is_grad_enabled()
        torch.rand(3)
        if fails:
            raise RuntimeError("shapes do not match")
        return evaluate.model(batch.expand(-1, 3)).mean()

    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with pytest.raises(RuntimeError, match="shapes") if fails else nullcontext():
        evaluate(score, DataLoader(torch.cat(VALUES), batch_size=4, shuffle=True))
    assert torch.equal(torch.rand(2), expected)
    assert [module.training for module in evaluate.model] == [True, False, True]
    assert evaluate.model[0].weight.grad is None


@pytest.mark.parametrize("fn", [lambda batch: batch.sum(), lambda batch: {"worst": batch.max()}])
def test_what_is_no_mean_over_rows_is_refused_once_it_has_to_be_split(tmp_path: Path, fn: Any) -> None:
    evaluate = Evaluated(tmp_path)
    evaluate(fn, VALUES)
    with pytest.raises(SplitRefusedError, match="weighted halves"):
        Evaluated(tmp_path / "b")(fitting(4, fn), VALUES)


def test_split_check_trust_declares_a_mean(tmp_path: Path) -> None:
    evaluate = Evaluated(tmp_path, split_check="trust")
    assert evaluate(fitting(4, lambda batch: batch.max()), VALUES) > 0


@pytest.mark.usefixtures("_hasty")
def test_one_row_that_does_not_fit_is_a_memory_error(tmp_path: Path) -> None:
    with pytest.raises(GPUMemoryError, match="one row") as caught:
        Evaluated(tmp_path)(fitting(0), VALUES)
    assert caught.value.details["phase"] == "evaluation"
    assert caught.value.details["micro_batch_size"] == 1


def test_without_recovery_the_first_lack_of_memory_is_the_last(tmp_path: Path) -> None:
    with pytest.raises(GPUMemoryError, match="oom_recovery=False"):
        Evaluated(tmp_path, oom_recovery=False)(fitting(0), VALUES)


@pytest.mark.usefixtures("_hasty")
def test_a_batch_without_rows_needs_a_weight_and_to_be_split_a_split(tmp_path: Path) -> None:
    class Graphs(list[Tensor]):
        """What graph libraries call a batch."""

    batch = Graphs([torch.ones(2), torch.ones(3)])
    with pytest.raises(InvalidSettingError, match="weight="):
        Evaluated(tmp_path / "a")(lambda b: 1.0, [batch])
    assert Evaluated(tmp_path / "b")(lambda b: 1.0, [batch], weight=len) == 1.0
    with pytest.raises(SplitRefusedError, match="split="):
        Evaluated(tmp_path / "c")(fitting(1, lambda b: 1.0), [batch], weight=len)
    cut = Evaluated(tmp_path / "d", split=lambda b, most: [b[i : i + most] for i in range(0, len(b), most)])
    assert cut(fitting(1, lambda b: float(len(b[0]))), [batch]) == 2.5


def test_nothing_to_evaluate_is_not_a_number(tmp_path: Path) -> None:
    found = Evaluated(tmp_path)(lambda b: 1.0, [])
    assert found != found


@pytest.mark.parametrize("fn", [lambda b: b, lambda b: {"a" if len(b) > 4 else "b": 1.0}])
def test_scores_of_another_shape_or_other_names_are_refused(tmp_path: Path, fn: Any) -> None:
    with pytest.raises(TypeError, match="evaluate: fn"):
        Evaluated(tmp_path)(fn, VALUES)


def test_evaluation_belongs_into_a_watch(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettingError, match="outside watch"):
        Guard(tmp_path, observers=[]).evaluate(lambda b: 1.0, VALUES)


# -- checkpoints -----------------------------------------------------------------------------------------------------


class Greedy:
    """State that takes memory to be told, which is not there ``failures`` times."""

    def __init__(self, failures: int) -> None:
        self.failures = failures

    def state_dict(self) -> dict[str, Any]:
        self.failures -= 1
        if self.failures >= 0:
            raise out_of_memory_error()
        return {"kept": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.failures = 0


@pytest.mark.parametrize("failures", [1, 2])
def test_a_checkpoint_that_runs_out_of_memory_is_taken_after_memory_was_released(tmp_path: Path, failures: int) -> None:
    guard, events = guarded(tmp_path, checkpoint_every_steps=2)
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outcome = pytest.raises(GPUMemoryError, match="checkpoint") if failures > 1 else nullcontext()
    with outcome as caught, guard.watch(model=model, optimizer=optimizer, greedy=Greedy(failures)):
        for x, y in guard.batches(DataLoader(Rows(32), batch_size=8), max_steps=4):
            guard.backward(lambda b: functional.mse_loss(model(b[0]), b[1]), (x, y))
            optimizer.step()
            optimizer.zero_grad()
    if failures == 1:
        assert guard.newest_checkpoint is not None
        assert any(isinstance(e, Notice) and "out of memory in checkpoint" in e.text for e in events)
    else:
        assert caught.value.details["phase"] == "checkpoint"  # type: ignore[union-attr]


# -- what the error tells --------------------------------------------------------------------------------------------


def test_the_error_of_the_host_names_no_device() -> None:
    text = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12"
    error = Shortage.of("load", RuntimeError(text)).error("why")
    assert error.details["requested_bytes"] == 4096
    assert error.details["reserved_bytes"] is None
    assert error.details["foreign_pid"] is None
    assert error.to_dict()["details"]["phase"] == "load"  # type: ignore[call-overload, index]


def test_a_shortage_keeps_no_traceback_alive() -> None:
    held: list[weakref.ref[Tensor]] = []

    def fails() -> None:
        activation = torch.zeros(8)
        held.append(weakref.ref(activation))
        raise out_of_memory_error()

    gc.disable()
    try:
        try:
            fails()
        except torch.OutOfMemoryError as error:
            shortage = Shortage.of("forward", error)
        assert held[0]() is None
    finally:
        gc.enable()
    assert shortage.memory.requested_bytes == 2 * 2**30


class Busy:
    """A device whose driver names the processes on it."""

    def __init__(self, processes: Any) -> None:
        self.found = processes

    def processes(self) -> Any:
        return self.found


OWN, SMALL, LARGE = GpuProcess(10, 5 * 2**30), GpuProcess(11, 2**30), GpuProcess(12, 30 * 2**30)


@pytest.mark.parametrize(
    ("devices", "index", "expected"),
    [
        ([Busy((OWN, SMALL, LARGE))], 0, LARGE),
        ([Busy((OWN,))], 0, None),
        ([Busy((SMALL, LARGE))], 0, None),  # the driver numbers processes otherwise: any may be our own
        ([Busy(Unknown("no answer"))], 0, None),
        ([object()], 0, None),
        ([], 0, None),
        ([Busy((OWN, SMALL)), Busy((OWN, LARGE))], 1, LARGE),
    ],
)
def test_the_largest_foreign_consumer_is_named_where_it_is_known(devices: Any, index: int, expected: Any) -> None:
    assert foreign_process(devices, index, own_pid=10) == expected
