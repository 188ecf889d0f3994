"""Out of memory in the middle of a run: what trainwarden and its peers make of it, side by side.

Every contestant trains the same small network from the same weights on the same 80 samples in the same order with
AdamW and a linear schedule to zero: a batch size of 8, so 10 steps. From step 7 on, more than 4 rows in one forward
pass raise ``torch.OutOfMemoryError`` (`trainwarden.testing.MemoryCeiling`, the same object for all).

What "step 7" means to a peer that starts over is a choice, so both readings are run:

- fault "attempt" (the main table): the seventh step of the attempt. Memory need follows the position in the
  training: longer sequences, a layer that is unfrozen, a batch of many targets. A new attempt walks into it again.
- fault "process": the seventh optimizer step since the process began, restarts included. Memory was lost for good
  (another process took it), so each new attempt that is still too large fails in its first batch. This is the reading
  that is kinder to the peers.

For the Guard, which does not start over, both are the same.

Composer's automatic microbatching (mosaicml 0.32.1) is not beside them: it requires torch<2.7.1, so that pip refuses to
install it with the torch 2.13 of all others, and it shrinks on a GPU only.

"Trained" rows are those of completed optimizer steps; "run" rows are all that entered a training forward pass, the
failed ones included; rows of forward passes without gradients (the Guard's one check that the loss can be split) are in
the JSON as ``checked``. "Control" is the distance of the same contestant without the fault: that it is zero shows that
all train the same thing. "Time lost" is wall time beyond the same contestant's without the fault, imports done before.
"""

from __future__ import annotations

import logging
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import benchkit
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from trainwarden import Guard
from trainwarden.testing import MemoryCeiling

SAMPLES, BATCH, FITS, FROM_STEP, STEPS, PEAK_LR = 80, 8, 4, 7, 10, 1e-2
WIDTH = 32
TOLERANCE = 1e-5

Fault = Literal["none", "attempt", "process"]
Batch = Mapping[str, torch.Tensor]


class Samples(Dataset[dict[str, torch.Tensor]]):
    """Regression on a fixed random function; a sample is ``{"inputs": [32], "targets": [1]}``, float32."""

    def __init__(self, seed: int, count: int = SAMPLES) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(count, WIDTH, generator=generator)
        self.targets = self.inputs[:, :4].sin().sum(1, keepdim=True)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"inputs": self.inputs[index], "targets": self.targets[index]}


class Network(nn.Module):
    """A small multi-layer perceptron; ``forward`` returns the mean squared error."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(WIDTH, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(self.layers(inputs), targets)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.0)


def linear_schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """From the peak to zero in ``steps`` steps, as ``transformers`` makes it by default."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1.0 - step / steps))


@dataclass
class Record:
    """What happened to one contestant, written down by hooks that are the same for all."""

    seed: int
    fault: Fault
    attempts: list[int] = field(default_factory=list)
    steps_in_attempt: int = 0
    rows_trained: int = 0
    rows_checked: int = 0
    learning_rates: list[float] = field(default_factory=list)
    trained_after_step: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        never = FROM_STEP if self.fault != "none" else sys.maxsize
        self.ceiling = MemoryCeiling(FITS, from_step=never, steps_completed=self._steps_completed)
        self._since_step = 0

    def begin_attempt(self, batch_size: int) -> None:
        self.attempts.append(batch_size)
        self.steps_in_attempt = self._since_step = 0

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Counts the optimizer's steps and notes the learning rate that each one used."""

        def note(stepped: torch.optim.Optimizer, *_: Any) -> None:
            self.steps_in_attempt += 1
            self.rows_trained += self._since_step
            self._since_step = 0
            self.learning_rates.append(float(stepped.param_groups[0]["lr"]))
            self.trained_after_step.append(self.rows_trained)

        optimizer.register_step_post_hook(note)

    def limited(self, model: nn.Module) -> Callable[[Batch], torch.Tensor]:
        """The loss of a batch under the memory ceiling; rows whose loss was computed wait for their optimizer step."""

        def compute_loss(batch: Batch) -> torch.Tensor:
            loss: torch.Tensor = model(batch["inputs"], batch["targets"])
            if torch.is_grad_enabled():
                self._since_step += len(batch["inputs"])
            else:
                self.rows_checked += len(batch["inputs"])
            return loss

        return self.ceiling(compute_loss)

    def _steps_completed(self) -> int:
        return self.steps_in_attempt if self.fault == "attempt" else len(self.learning_rates)


Contestant = Callable[[Record], nn.Module]


def plain_loop(record: Record) -> nn.Module:
    """The loop that the guarded one is compared with; nothing recovers it."""
    model = Network(record.seed)
    optimizer = make_optimizer(model)
    scheduler = linear_schedule(optimizer, STEPS)
    record.watch(optimizer)
    record.begin_attempt(BATCH)
    _train(record, model, optimizer, scheduler, BATCH)
    return model


def guard(record: Record) -> nn.Module:
    """The same loop under a Guard."""
    model = Network(record.seed)
    optimizer = make_optimizer(model)
    scheduler = linear_schedule(optimizer, STEPS)
    compute_loss = record.limited(model)
    record.watch(optimizer)
    record.begin_attempt(BATCH)
    loader = DataLoader(Samples(record.seed), batch_size=BATCH)
    with tempfile.TemporaryDirectory() as directory:
        warden = Guard(Path(directory) / "run")
        with warden.watch(model=model, optimizer=optimizer, scheduler=scheduler):
            for batch in warden.batches(loader, max_steps=STEPS):
                warden.backward(compute_loss, batch)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return model


def accelerate_outside(record: Record) -> nn.Module:
    """``find_executable_batch_size`` around a loop whose model, optimizer and schedule were built before."""
    from accelerate.utils import find_executable_batch_size

    model = Network(record.seed)
    optimizer = make_optimizer(model)
    scheduler = linear_schedule(optimizer, STEPS)
    record.watch(optimizer)

    @find_executable_batch_size(starting_batch_size=BATCH)  # type: ignore[untyped-decorator]
    def train(batch_size: int) -> None:
        record.begin_attempt(batch_size)
        _train(record, model, optimizer, scheduler, batch_size)

    train()
    return model


def accelerate_inside(record: Record) -> nn.Module:
    """``find_executable_batch_size`` as documented: each attempt builds everything anew."""
    from accelerate.utils import find_executable_batch_size

    @find_executable_batch_size(starting_batch_size=BATCH)  # type: ignore[untyped-decorator]
    def train(batch_size: int) -> nn.Module:
        model = Network(record.seed)
        optimizer = make_optimizer(model)
        record.watch(optimizer)
        record.begin_attempt(batch_size)
        scheduler = linear_schedule(optimizer, math.ceil(SAMPLES / batch_size))
        _train(record, model, optimizer, scheduler, batch_size)
        return model

    trained: nn.Module = train()
    return trained


def transformers_epoch(record: Record) -> nn.Module:
    """``transformers.Trainer(auto_find_batch_size=True)`` for one epoch."""
    return _transformers(record, num_train_epochs=1)


def transformers_steps(record: Record) -> nn.Module:
    """The same with ``max_steps=10``."""
    return _transformers(record, max_steps=STEPS)


def _train(record: Record, model: nn.Module, optimizer: Any, scheduler: Any, batch_size: int) -> None:
    compute_loss = record.limited(model)
    for batch in DataLoader(Samples(record.seed), batch_size=batch_size):
        compute_loss(batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def _transformers(record: Record, **length: int) -> nn.Module:
    from transformers import TrainerCallback, TrainingArguments

    model = Network(record.seed)
    trainer_class = benchkit.observed_trainer(record.limited(model), record.watch)

    class NoteAttempts(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            record.begin_attempt(state.train_batch_size)

    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory, per_device_train_batch_size=BATCH, auto_find_batch_size=True,
            learning_rate=PEAK_LR, lr_scheduler_type="linear", optim="adamw_torch", weight_decay=0.0,
            max_grad_norm=0.0, train_sampling_strategy="sequential", use_cpu=True, seed=record.seed,
            save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
            dataloader_pin_memory=False, **length,
        )  # fmt: skip
        trainer_class(
            model=model, args=arguments, train_dataset=Samples(record.seed), callbacks=[NoteAttempts()]
        ).train()
    return model


CONTESTANTS: dict[str, Contestant] = {
    "trainwarden Guard": guard,
    "accelerate, built outside": accelerate_outside,
    "accelerate, built inside": accelerate_inside,
    "transformers, 1 epoch": transformers_epoch,
    "transformers, max_steps=10": transformers_steps,
}


# -- one comparison ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """One contestant under one fault; ``distance`` is relative, over all parameters concatenated, in float64."""

    contestant: str
    fault: Fault
    due: int
    run: int
    trained: int
    checked: int
    attempts: list[int]
    effective_batch: int
    optimizer_steps: int
    schedule_kept: bool
    final_lr: float
    distance: float
    control_distance: float
    lost_s: float
    announced: list[str]
    learning_rates: list[float]
    trained_after_step: list[int]


def compare(seed: int, faults: Sequence[Fault] = ("attempt", "process")) -> list[Outcome]:
    """The undisturbed run, then every contestant without and with each of the faults."""
    reference = Record(seed, "none")
    reference_weights = weights_of(plain_loop(reference))
    outcomes = [_outcome("undisturbed", reference, reference, Run(reference_weights, [], 0.0), 0.0, 0.0, 0.0)]
    for name, contestant in CONTESTANTS.items():
        control = _run(contestant, Record(seed, "none"))
        control_distance = distance(control.weights, reference_weights)
        control_s = _run(contestant, Record(seed, "none")).wall_s  # the first has imported what it needs
        for fault in faults:
            record = Record(seed, fault)
            run = _run(contestant, record)
            far = distance(run.weights, reference_weights)
            outcomes.append(_outcome(name, record, reference, run, far, control_distance, run.wall_s - control_s))
    return outcomes


@dataclass(frozen=True)
class Run:
    """Final weights, the lines that mention memory, batch or retry, and the wall time of one contestant's run."""

    weights: torch.Tensor
    said: list[str]
    wall_s: float


def _run(contestant: Contestant, record: Record) -> Run:
    began_s = time.perf_counter()
    with captured_output() as lines:
        model = contestant(record)
    wall_s = time.perf_counter() - began_s
    said = [line for line in lines if re.search(r"memory|batch|retry", line, re.IGNORECASE)]
    return Run(weights_of(model), said, wall_s)


def _outcome(
    name: str, record: Record, reference: Record, run: Run, far: float, control: float, lost_s: float
) -> Outcome:
    rates = record.learning_rates
    return Outcome(
        contestant=name,
        fault=record.fault,
        due=SAMPLES,
        run=record.ceiling.samples,
        trained=record.rows_trained,
        checked=record.rows_checked,
        attempts=record.attempts,
        effective_batch=record.trained_after_step[-1] - record.trained_after_step[-2],
        optimizer_steps=len(rates),
        schedule_kept=rates == reference.learning_rates,
        final_lr=rates[-1],
        distance=far,
        control_distance=control,
        lost_s=lost_s,
        announced=run.said,
        learning_rates=rates,
        trained_after_step=record.trained_after_step,
    )


def weights_of(model: nn.Module) -> torch.Tensor:
    """All parameters concatenated, in float64."""
    return torch.cat([p.detach().double().reshape(-1) for p in model.parameters()])


def distance(weights: torch.Tensor, reference: torch.Tensor) -> float:
    return float((weights - reference).norm() / reference.norm())


@contextmanager
def captured_output() -> Iterator[list[str]]:
    """Collects every line that the process writes meanwhile, by whatever way: logging, warnings, print."""
    lines: list[str] = []
    logging.captureWarnings(True)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as sink:
        saved = [(fd, os.dup(fd)) for fd in (1, 2)]
        _flush()
        try:
            for fd, _ in saved:
                os.dup2(sink.fileno(), fd)
            yield lines
        finally:
            _flush()
            for fd, original in saved:
                os.dup2(original, fd)
                os.close(original)
            logging.captureWarnings(False)
            sink.seek(0)
            lines.extend(sink.read().splitlines())


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


# -- results -------------------------------------------------------------------------------------------------------

COLUMNS = (
    "contestant", "rows run", "rows trained", "attempts", "last batch", "optimizer steps",
    "LR schedule", "last LR", "distance", "control", "time lost", "announced",
)  # fmt: skip


def table(outcomes: Sequence[Outcome], fault: Fault) -> str:
    """The outcomes under one fault, headed by the undisturbed run."""
    return benchkit.markdown_table(COLUMNS, [_row(o) for o in outcomes if o.fault in ("none", fault)])


def _row(outcome: Outcome) -> list[str]:
    return [
        outcome.contestant,
        f"{outcome.run} of {outcome.due}",
        f"{outcome.trained} of {outcome.due}",
        " → ".join(map(str, outcome.attempts)),
        str(outcome.effective_batch),
        str(outcome.optimizer_steps),
        "kept" if outcome.schedule_kept else "**changed**",
        f"{outcome.final_lr:.0e}" if outcome.final_lr else "**0**",
        f"{outcome.distance:.1e}",
        f"{outcome.control_distance:.1e}",
        "–" if outcome.fault == "none" else f"{outcome.lost_s * 1e3:.0f} ms",
        "–" if outcome.fault == "none" else "yes" if outcome.announced else "**silent**",
    ]


def holds(outcomes: Sequence[Outcome]) -> bool:
    """What the Guard promises: each sample trained once, at most 8 run again, schedule and weights kept."""
    return all(
        o.run <= SAMPLES + BATCH
        and o.trained == SAMPLES
        and o.effective_batch == BATCH
        and o.schedule_kept
        and o.distance < TOLERANCE
        and o.announced != []
        for o in outcomes
        if o.contestant == "trainwarden Guard"
    )


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Learning rate over rows trained, rows run, and how far the final weights end from the undisturbed run's."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = [o for o in outcomes if o.fault in ("none", "attempt")]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained", width_ratios=[2.2, 1, 1])
    _plot_rates(axes[0], shown)
    _plot_bars(axes[1], axes[2], shown)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Batch of 8 that fits only at 4 from step 7 on: 10 steps over 80 samples", fontsize=12)
    figure.savefig(path, dpi=110)
    plt.close(figure)


COLOURS = ("0.6", "#0b7a4b", "#d95f02", "#b8860b", "#7570b3", "#e7298a")


def _plot_rates(axis: Any, shown: Sequence[Outcome]) -> None:
    for place, (outcome, colour) in enumerate(zip(shown, COLOURS, strict=True)):
        axis.plot(
            outcome.trained_after_step,
            outcome.learning_rates,
            color=colour,
            label=outcome.contestant,
            linewidth=(6, 2.2, 1.3, 2.6, 1.3, 1.3)[place],  # lines that coincide stay visible under each other
            marker=".",
            markersize=5,
            zorder=3 if place == 1 else 2,
        )
    axis.axvline(SAMPLES, color="0.3", linewidth=0.8, linestyle="--")
    axis.annotate(
        "80 due", (SAMPLES, PEAK_LR * 1.05), fontsize=8, color="0.3", xytext=(3, 0), textcoords="offset points"
    )
    axis.set(xlabel="rows trained", ylabel="learning rate of the step", ylim=(-3e-4, PEAK_LR * 1.09))
    axis.legend(fontsize=8, loc="center", bbox_to_anchor=(0.545, 0.24))


def _plot_bars(run: Any, far: Any, shown: Sequence[Outcome]) -> None:
    names = [o.contestant for o in shown]
    run.barh(names, [o.run for o in shown], color=COLOURS)
    run.bar_label(run.containers[0], padding=3, fontsize=8)
    run.axvline(SAMPLES, color="0.3", linewidth=0.8, linestyle="--")
    run.set(xlabel="rows run (80 due)", xlim=(0, 300))
    floor = 1e-10  # a logarithmic axis has no zero
    far.barh(names, [max(o.distance, floor) for o in shown], color=COLOURS)
    far.bar_label(far.containers[0], [f"{o.distance:.1e}" if o.distance else "0" for o in shown], padding=3, fontsize=8)
    far.axvline(TOLERANCE, color="0.3", linewidth=0.8, linestyle="--")
    far.set(xscale="log", xlabel="relative distance of the final weights", xlim=(floor, 1e3))
    far.set_yticks([])
    for axis in (run, far):
        axis.invert_yaxis()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison; exit status 1 when the Guard does not keep its promise."""
    options = benchkit.parser(__doc__ or "").parse_args(arguments)
    with tempfile.TemporaryDirectory() as home:
        benchkit.prepare_process(home)
        outcomes = compare(options.seed)
    packages = ["trainwarden", "torch", "accelerate", "transformers"]
    command = f"python benchmarks/oom_recovery.py --seed {options.seed}"
    facts = benchkit.environment(command, "cpu", packages)
    tables = "\n\n".join(
        f"Fault from the seventh step of the {fault} on (seed {options.seed}):\n\n{table(outcomes, fault)}"
        for fault in ("attempt", "process")
    )
    print(tables)
    result = {"environment": facts, "seed": options.seed, "outcomes": [asdict(o) for o in outcomes]}
    benchkit.write_json(options.output / "oom_recovery.json", result)
    (options.output / "oom_recovery.md").write_text(tables + "\n", encoding="utf-8")
    if benchkit.installed("matplotlib"):
        plot(outcomes, options.output / "oom_recovery.png")
    kept = holds(outcomes)
    print(f"\nGuard keeps its promise: {'yes' if kept else 'NO'}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
