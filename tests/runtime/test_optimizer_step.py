"""An optimizer step that runs out of memory is finished: every parameter is updated once, bit for bit."""

from __future__ import annotations

import functools
import itertools
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.runtime.loops import Loop, Rows, small_model
from trainwarden.errors import GPUMemoryError
from trainwarden.events import Notice, OptimizerStepFinished
from trainwarden.runtime import optimizer_step
from trainwarden.runtime.optimizer_step import OptimizerStep
from trainwarden.runtime.replay import counters_tell
from trainwarden.runtime.separable import body_of
from trainwarden.testing import FailingAllocation, out_of_memory_error

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
LISTS = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def of(name: str, implementation: str, **options: Any) -> Make:
    kind = getattr(torch.optim, name)
    return lambda groups: kind(groups, **LISTS[implementation], **options)


MAIN: dict[str, Make] = {
    f"{name}, {how}": of(name, how, **options)
    for name, ways, options in (
        ("SGD", LISTS, {"lr": 0.1}),
        ("SGD", LISTS, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        ("AdamW", LISTS, {"lr": 0.1, "amsgrad": True}),
        ("Adafactor", ("for-loop", "foreach"), {"lr": 0.1}),
    )
    for how in ways
}
OTHERS: dict[str, Make] = {
    f"{name}, {how}": of(name, how)
    for name in ("Adadelta", "Adagrad", "Adam", "Adamax", "NAdam", "RAdam", "RMSprop")
    for how in ("for-loop", "foreach")
}
REFUSED_AT_TIMES = {f"{name}, {how}": of(name, how) for name in ("ASGD", "Rprop") for how in ("for-loop", "foreach")}
"""They read what they have overwritten: at some places a step of theirs cannot be finished."""


@pytest.fixture
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without collecting garbage before each of thousands of attempts; what is injected takes no memory."""
    monkeypatch.setattr(optimizer_step, "release_memory", lambda: None)


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (5, 3), (5, 2), (6,))]


class Run:
    """Steps over two groups, of which one allocation of step ``at_step`` may fail. ``bare``: without a guard."""

    def __init__(
        self, make: Make, at_step: int = -1, fault: FailingAllocation | None = None, *, bare: bool = False
    ) -> None:
        self.parameters = parameters()
        self.optimizer = make([{"params": self.parameters[:2]}, {"params": self.parameters[2:]}])
        if "weight_decay" in self.optimizer.defaults:
            self.optimizer.param_groups[1]["weight_decay"] = 0.1
        self.finished: list[int] = []
        self.step = OptimizerStep(
            self.optimizer, self.optimizer.step, recover=True, on_finished=lambda parts, _: self.finished.append(parts)
        )
        for index in range(3):
            self.take(index, fault if index == at_step else None, self.optimizer.step if bare else self.step.run)

    def take(self, index: int, fault: FailingAllocation | None, step: Callable[[], Any] | None = None) -> None:
        generator = torch.Generator().manual_seed(100 + index)
        for parameter in self.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        with fault or nullcontext():
            (step or self.step.run)()

    def everything(self) -> list[Tensor]:
        states = self.optimizer.state_dict()["state"].values()
        return [*(p.detach() for p in self.parameters), *(value for state in states for value in state.values())]


def same(ours: Run, theirs: Run) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours.everything(), theirs.everything(), strict=True))


def every_allocation(make: Make, at_step: int, times: int = 1) -> Iterator[tuple[int, Run]]:
    at = 1
    while True:
        fault = FailingAllocation(at, times=times)
        run = Run(make, at_step, fault)
        if not fault.struck:
            return
        yield at, run
        at += 1


# -- wherever it strikes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MAIN, *OTHERS, *REFUSED_AT_TIMES])
def test_a_step_that_lacks_nothing_is_torchs_own_bit_for_bit(name: str) -> None:
    make = {**MAIN, **OTHERS, **REFUSED_AT_TIMES}[name]
    run = Run(make)
    assert same(run, Run(make, bare=True))
    assert run.finished == []


@pytest.mark.usefixtures("_hasty")
@pytest.mark.parametrize("at_step", [0, 2], ids=["first step", "later step"])
@pytest.mark.parametrize("name", MAIN)
def test_whichever_allocation_fails_the_update_is_the_same_bit_for_bit(name: str, at_step: int) -> None:
    make, struck = MAIN[name], 0
    undisturbed = Run(make)
    for at, run in every_allocation(make, at_step):
        assert same(run, undisturbed), f"allocation {at}"
        assert len(run.finished) == 1
        assert not run.step.torn
        struck += 1
    stateless = name.startswith("SGD, ") and at_step
    assert struck or stateless


@pytest.mark.usefixtures("_hasty")
@pytest.mark.parametrize("at_step", [0, 2], ids=["first step", "later step"])
@pytest.mark.parametrize("name", OTHERS)
def test_the_other_optimizers_of_torch_are_finished_too(name: str, at_step: int) -> None:
    undisturbed = Run(OTHERS[name])
    chosen = random.Random(f"{name} {at_step}")
    for _ in range(5):
        run = Run(OTHERS[name], at_step, FailingAllocation(chosen.randint(1, 12), times=chosen.randint(1, 2)))
        assert same(run, undisturbed)


@pytest.mark.torture
@pytest.mark.usefixtures("_hasty")
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("at_step", [0, 2], ids=["first step", "later step"])
@pytest.mark.parametrize("name", [*MAIN, *OTHERS])
def test_every_allocation_of_every_optimizer(name: str, at_step: int, times: int) -> None:
    make = {**MAIN, **OTHERS}[name]
    undisturbed = Run(make)
    for at, run in every_allocation(make, at_step, times):
        assert same(run, undisturbed), f"allocation {at}"


@pytest.mark.usefixtures("_hasty")
@pytest.mark.parametrize("name", REFUSED_AT_TIMES)
def test_what_cannot_be_finished_exactly_is_not_finished_wrongly(name: str) -> None:
    make = REFUSED_AT_TIMES[name]
    undisturbed, at, refused = Run(make), 0, 0
    while True:
        at += 1
        fault = FailingAllocation(at)
        try:
            run = Run(make, 2, fault)
        except GPUMemoryError as error:
            assert "overwritten" in error.message  # noqa: PT017 - which of the allocations are refused is torch's affair
            refused += 1
            continue
        if not fault.struck:
            break
        assert same(run, undisturbed), f"allocation {at}"
    assert refused or name == "Rprop, for-loop"


@pytest.mark.parametrize("at_step", [0, 1, 2])
def test_where_counters_tell_about_lists_too_no_journal_is_kept(monkeypatch: pytest.MonkeyPatch, at_step: int) -> None:
    """As on CUDA. Here torch raises them only outside a dispatch mode, so that the fault must not be one either."""
    make, failures = MAIN["AdamW, foreach"], [True]
    undisturbed, run = Run(make), Run(make)
    root = torch._foreach_sqrt

    def fails_once(tensors: Any) -> Any:
        if failures and failures.pop():
            raise out_of_memory_error()
        return root(tensors)

    for index in range(3):
        undisturbed.take(index, None)
        monkeypatch.setattr(run.step, "_manner", lambda _kwargs: "counters")
        if index == at_step:
            monkeypatch.setattr(torch, "_foreach_sqrt", fails_once)
        run.take(index, None)
    assert failures == []
    assert len(run.finished) == 1
    assert same(run, undisturbed)


def test_whether_counters_tell_is_found_out_by_trying() -> None:
    """On the CPU lists are worked on one tensor after the other, which counts; torch's fused kernels do not count."""

    def tell(optimizer: torch.optim.Optimizer) -> bool:
        return counters_tell(optimizer, body_of(type(optimizer)))

    before = torch.get_rng_state()
    for foreach in (True, False):
        optimizer = torch.optim.AdamW(parameters(), foreach=foreach, amsgrad=True)
        assert tell(optimizer)
        assert not optimizer.state, "the optimizer itself takes no step"
    assert tell(torch.optim.SGD(parameters(), momentum=0.9, nesterov=True, foreach=True))
    assert not tell(torch.optim.AdamW(parameters(), fused=True))
    assert torch.equal(torch.get_rng_state(), before)


# -- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["before the kernel", "counters not raised yet"])
@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("name", ["AdamW", "Adam", "Adagrad"])
def test_a_fused_kernel_that_fails_is_run_again_and_no_other(
    name: str, group: int, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No journal is kept of a step of one kernel a group: the order of the kernels tells which has not run."""
    make = of(name, "fused", lr=0.1)
    expected, run = Run(make, bare=True), Run(make)
    monkeypatch.setattr(optimizer_step, "Journal", None)
    kernel_name = f"_fused_{name.lower()}_"
    patched = kernel_name if place == "before the kernel" else "_foreach_add_"
    kernel, calls = getattr(torch, patched), itertools.count()

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == group:
            raise out_of_memory_error()
        return kernel(*args, **kwargs)

    monkeypatch.setattr(torch, patched, failing)
    run.take(3, None)
    monkeypatch.undo()
    expected.take(3, None, expected.optimizer.step)
    assert next(calls) > 2
    assert same(run, expected)
    assert run.finished
    assert not run.step.torn


def test_a_step_whose_temporaries_do_not_fit_is_done_in_parts_and_later_ones_begin_so() -> None:
    largest_bytes = 4 * 15
    run, undisturbed = Run(MAIN["AdamW, foreach"]), Run(MAIN["AdamW, foreach"])
    faults = [FailingAllocation(above_bytes=largest_bytes) for _ in range(3)]
    for index, fault in enumerate(faults):
        run.take(3 + index, fault)
        undisturbed.take(3 + index, None)
    assert faults[0].struck >= 1
    assert [fault.struck for fault in faults[1:]] == [0, 0], "no failure is provoked twice"
    assert len(run.finished) == 1
    assert run.finished[0] > 2
    assert run.step.part_bytes is not None
    assert same(run, undisturbed)


def test_hooks_of_the_user_run_once_around_a_step_in_parts() -> None:
    calls: list[str] = []
    make = MAIN["AdamW, foreach"]
    run = Run(make)
    run.optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    run.optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    with FailingAllocation(2):
        run.step.run()
    assert calls == ["before", "after"]
    assert len(run.finished) == 1


@pytest.mark.usefixtures("_hasty")
def test_parameters_without_a_gradient_and_groups_added_later_are_ordinary() -> None:
    def run(fault: FailingAllocation | None) -> list[Tensor]:
        made = parameters()
        optimizer = torch.optim.AdamW(made[:2], lr=0.1, foreach=True)
        step = OptimizerStep(optimizer, optimizer.step, recover=True, on_finished=lambda *_: None)
        made[0].grad = torch.ones_like(made[0])
        step.run()
        optimizer.add_param_group({"params": made[2:]})
        for parameter in made[1:]:
            parameter.grad = torch.ones_like(parameter)
        with fault or FailingAllocation():
            step.run()
        return [p.detach() for p in made]

    for at in range(1, 12):
        assert all(torch.equal(a, b) for a, b in zip(run(FailingAllocation(at)), run(None), strict=True)), at


@pytest.mark.parametrize("foreach", [True, False])
def test_complex_parameters_are_followed_through_their_real_views(foreach: bool) -> None:
    def run(fault: FailingAllocation) -> Tensor:
        parameter = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        optimizer = torch.optim.AdamW([parameter], lr=0.1, foreach=foreach)
        step = OptimizerStep(optimizer, optimizer.step, recover=True, on_finished=lambda *_: None)
        for index in range(3):
            parameter.grad = torch.full((3,), 1 + 2j)
            with fault if index else FailingAllocation():
                step.run()
        return parameter.detach()

    assert torch.equal(run(FailingAllocation(1)), run(FailingAllocation()))


@pytest.mark.parametrize("foreach", [True, False])
def test_parameters_that_are_pieces_of_one_tensor_are_not_confused(foreach: bool) -> None:
    """They share one version counter: with lists they are told apart all the same, one by one they are refused."""

    def run(fault: FailingAllocation) -> Tensor:
        flat = torch.ones(6)
        pieces = [nn.Parameter(flat[:4]), nn.Parameter(flat[4:])]
        optimizer = torch.optim.AdamW(pieces, lr=0.1, foreach=foreach)
        step = OptimizerStep(optimizer, optimizer.step, recover=True, on_finished=lambda *_: None)
        for index in range(2):
            for piece in pieces:
                piece.grad = torch.ones_like(piece)
            with fault if index else nullcontext():
                step.run()
        return flat

    if foreach:
        assert torch.equal(run(FailingAllocation(1)), run(FailingAllocation()))
    else:
        with pytest.raises(GPUMemoryError, match="share memory"):
            run(FailingAllocation(3))


# -- what is not finished --------------------------------------------------------------------------------------------


def test_when_nothing_has_begun_the_weights_and_states_are_those_of_the_last_step() -> None:
    run = Run(MAIN["AdamW, foreach"])
    before = [tensor.clone() for tensor in run.everything()]
    added = nn.Parameter(torch.ones(3))
    run.optimizer.add_param_group({"params": [added]})
    for parameter in run.parameters:
        parameter.grad = None
    run.finished.clear()
    added.grad = torch.ones(3)
    with FailingAllocation(1, times=99), pytest.raises(GPUMemoryError, match="one parameter at a time"):
        run.step.run()
    assert not run.step.torn
    assert added not in run.optimizer.state, "half-made states are gone: the next step would meet a KeyError"
    assert all(torch.equal(a, b) for a, b in zip(run.everything(), before, strict=True))


def test_a_step_that_has_begun_and_cannot_be_finished_is_torn() -> None:
    run = Run(MAIN["AdamW, for-loop"])
    for parameter in run.parameters:
        parameter.grad = torch.ones_like(parameter)
    with FailingAllocation(3, times=99), pytest.raises(GPUMemoryError) as caught:
        run.step.run()
    assert run.step.torn
    assert caught.value.details["phase"] == "optimizer step"
    assert caught.value.details["requested_bytes"] == 2 * 2**30
    assert "fused=True" in str(caught.value.details["would_fit"])
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


class Sharpness(torch.optim.AdamW):
    """A step of its own around torch's."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def lbfgs(made: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(made)


def replaced(made: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(made)
    original = optimizer.step
    optimizer.step = functools.partial(original)  # type: ignore[method-assign]
    return optimizer


def hooked(made: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(made)
    optimizer.register_step_post_hook(lambda *_: torch.empty(3))
    return optimizer


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lbfgs, "closure"),
        (Sharpness, "step of its own"),
        (replaced, "has been replaced"),
        (hooked, "hook"),
        (lambda made: torch.optim.AdamW(made, differentiable=True), "differentiable"),
    ],
)
def test_a_step_that_is_not_torchs_own_ends_in_a_typed_error(make: Any, why: str) -> None:
    made = [parameter.detach() for parameter in parameters()]
    optimizer = make(made)
    step = OptimizerStep(optimizer, optimizer.step, recover=True, on_finished=lambda *_: None)
    closures = [lambda: torch.empty(3).sum()] if isinstance(optimizer, torch.optim.LBFGS) else []
    for parameter in made:
        parameter.grad = torch.ones_like(parameter)
    step.run(*closures)
    with FailingAllocation() as counted:
        step.run(*closures)
    last = 1 if closures else counted.count
    with FailingAllocation(last, times=99), pytest.raises(GPUMemoryError, match=why) as caught:
        step.run(*closures)
    assert caught.value.code == "RUNTIME_GPU_OOM"
    assert step.torn


def test_recovery_can_be_switched_off() -> None:
    made = parameters()
    optimizer = torch.optim.AdamW(made)
    step = OptimizerStep(optimizer, optimizer.step, recover=False, on_finished=lambda *_: None)
    made[0].grad = torch.ones_like(made[0])
    with FailingAllocation(1), pytest.raises(GPUMemoryError, match="oom_recovery=False"):
        step.run()


def test_another_error_goes_through_and_leaves_the_step_torn() -> None:
    made = parameters()
    optimizer = torch.optim.AdamW(made)
    step = OptimizerStep(optimizer, optimizer.step, recover=True, on_finished=lambda *_: None)
    optimizer.param_groups[0]["betas"] = None
    made[0].grad = torch.ones_like(made[0])
    with pytest.raises(TypeError):
        step.run()
    assert step.torn


# -- in a run --------------------------------------------------------------------------------------------------------


class Striking(Loop):
    """A loop whose optimizer step runs out of memory: the fault is put around the guard's own wrapper."""

    at_step: int = 0
    fault: FailingAllocation = FailingAllocation()
    survive = False

    def run(self) -> Loop:
        torch.manual_seed(11)
        loader = torch.utils.data.DataLoader(Rows(), batch_size=self.batch_size, shuffle=True)
        with self.guard.watch(model=self.model, optimizer=self.optimizer, scheduler=self.scheduler):
            for batch in self.guard.batches(loader, max_steps=self.max_steps):
                self.losses.append(float(self.guard.backward(self.compute_loss, batch)))
                try:
                    with self.fault if self.guard.steps_completed == self.at_step else FailingAllocation():
                        self.optimizer.step()
                except GPUMemoryError:
                    if not self.survive:
                        raise
                    self.at_step = -1
                self.scheduler.step()
                self.optimizer.zero_grad()
        return self


def striking(run_dir: Path, at_step: int, fault: FailingAllocation, **options: Any) -> Striking:
    loop = Striking(run_dir, **options)
    loop.at_step, loop.fault = at_step, fault
    return loop


@pytest.mark.parametrize("at_step", [0, 6])
def test_a_run_whose_optimizer_step_runs_out_of_memory_ends_where_it_would_have(tmp_path: Path, at_step: int) -> None:
    undisturbed = Loop(tmp_path / "a").run()
    fault = FailingAllocation(9)  # the gate's look at the gradients comes first
    loop = striking(tmp_path / "b", at_step, fault)
    loop.run()
    assert fault.struck == 1
    assert torch.equal(loop.weights(), undisturbed.weights())
    (event,) = loop.named(OptimizerStepFinished)
    assert event.step == at_step
    assert "same update" in str(event)
    assert loop.guard.steps_completed == 10


def test_the_look_at_the_gradients_is_repeated_too(tmp_path: Path) -> None:
    undisturbed = Loop(tmp_path / "a").run()
    loop = striking(tmp_path / "b", 4, FailingAllocation(1))
    loop.run()
    assert torch.equal(loop.weights(), undisturbed.weights())
    assert any("tried once more" in notice.text for notice in loop.named(Notice))


def test_a_torn_step_ends_the_run_with_a_checkpoint_of_a_clean_one_from_which_it_continues(tmp_path: Path) -> None:
    undisturbed = Loop(tmp_path / "a").run()
    loop = striking(tmp_path / "b", 6, FailingAllocation(9, times=99), guard_options={"checkpoint_every_steps": 2})
    with pytest.raises(GPUMemoryError) as caught:
        loop.run()
    assert caught.value.steps_completed == 6
    assert str(caught.value.checkpoint_path).endswith("step-00000006")
    again = Loop(tmp_path / "b").run()
    assert torch.equal(again.weights(), undisturbed.weights())


def test_half_updated_weights_are_never_saved_even_if_the_loop_goes_on(tmp_path: Path) -> None:
    loop = striking(tmp_path, 6, FailingAllocation(9, times=99), guard_options={"checkpoint_every_steps": 1})
    loop.survive = True
    loop.run()
    saved = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert saved[-1].endswith("step-00000006")
    assert loop.guard.newest_checkpoint is not None
    assert any("half applied" in notice.text for notice in loop.named(Notice))


def test_a_step_that_raised_is_not_counted_as_one(tmp_path: Path) -> None:
    loop = striking(tmp_path, 3, FailingAllocation(9, times=99), max_steps=8)
    loop.survive = True
    loop.run()
    assert loop.guard.steps_completed == 8
    assert len(loop.losses) == 9


def test_the_scheduler_sees_the_step_called() -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    step = OptimizerStep(optimizer, optimizer.step, recover=True, on_finished=lambda *_: None)
    step.run()
    scheduler.step()  # warns, which is an error here, unless the optimizer was called


# -- a real allocator ------------------------------------------------------------------------------------------------

REAL = textwrap.dedent(
    """
    import gc, resource, sys, torch
    from torch import nn
    from trainwarden import Guard
    torch.set_num_threads(1)
    torch.manual_seed(0)
    at_step, megabytes, foreach = int(sys.argv[2]), float(sys.argv[3]), sys.argv[4] == "foreach"
    model = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(6))  # 4 MiB each
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=foreach, fused=False)
    guard = Guard(sys.argv[1], checkpoint_every_s=None)
    free = resource.RLIM_INFINITY
    with guard.watch(model=model, optimizer=optimizer):
        for batch in guard.batches([torch.ones(2, 1024)] * 3, max_steps=3):
            guard.backward(lambda b: sum(layer(b).square().mean() for layer in model), batch)
            if guard.steps_completed == at_step and megabytes:
                if foreach is False:  # what a collection gives back is all that is missing
                    gc.disable()
                    cycle = [torch.empty(12 << 20, dtype=torch.uint8)]
                    cycle.append(cycle)
                    del cycle
                used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (int(used + megabytes * 2**20), free))
            optimizer.step()
            resource.setrlimit(resource.RLIMIT_AS, (free, free))
            optimizer.zero_grad()
    steps = {float(state["step"]) for state in optimizer.state.values()}
    print(sum(p.double().sum().item() for p in model.parameters()).hex(), steps)
    """
)


@functools.cache
def undisturbed_real_run(run_dir: Path, implementation: str) -> str:
    return real_run(run_dir, 0, 0, implementation)[0]


def real_run(run_dir: Path, at_step: int, megabytes: float, implementation: str) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", REAL, str(run_dir), str(at_step), str(megabytes), implementation],
        capture_output=True,
        text=True,
        timeout=300,
        # Every tensor is mapped by itself and unmapped when freed, so that the size now is what is in use.
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    ("at_step", "megabytes", "implementation"),
    [
        (0, 62.0, "foreach"),  # the states take 48 MiB, the temporaries of all would take 24 MiB more
        (2, 10.0, "foreach"),
        (2, 2.0, "for-loop"),  # it needs two temporaries of 4 MiB at once
    ],
)
def test_a_real_allocator_failure_inside_the_step_is_recovered(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, at_step: int, megabytes: float, implementation: str
) -> None:
    whole = undisturbed_real_run(tmp_path_factory.getbasetemp() / f"whole-{implementation}", implementation)
    recovered, said = real_run(tmp_path, at_step, megabytes, implementation)
    assert "DefaultCPUAllocator" in said
    assert "optimizer step finished" in said
    assert recovered == whole, "bit-identical, and every parameter has taken three steps"
