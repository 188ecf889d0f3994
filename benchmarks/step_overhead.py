"""Host time that a guard adds to a training step, beside the loops of transformers and Lightning.

All contestants train the same model on the same batches, read through the same ``DataLoader``, with fused AdamW;
logging, checkpoints, progress bars, gradient clipping and the frameworks' own checks for NaN are switched off:

- ``bare``: forward, backward, ``optimizer.step()``, ``zero_grad()``;
- ``bare + clip_grad_norm_``: the same and one clip, a yardstick that most loops pay anyway;
- ``trainwarden Guard``: the bare loop under a Guard with its defaults, except that no checkpoint falls due;
- ``transformers Trainer`` and ``Lightning Trainer``: their loops, the frameworks' schedulers constant or absent.

The machine may be busy with other things, so nothing is compared across time: the loops live in one thread each and
take turns of some steps, round after round. Each turn begins with a few steps that are not counted (cold caches). A
contestant's figure is the median over rounds of its difference (or ratio) to the bare loop's turn in the same round,
with the quartiles as spread. Both wall time and the CPU time of the loop's own thread are taken; on a busy machine
the second is the one to trust. Shared caches and cores inflate even that, so "least" compares the quickest rounds: on a
quiet machine it and the median agree. The verdict is on the median.

On a GPU, host time is what the loop's thread needs to issue a step; nothing here synchronises.
"""

from __future__ import annotations

import cProfile
import logging
import pstats
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import benchkit
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from trainwarden import Guard

LIMIT_US = 100.0
BARE, CLIP, GUARD = "bare", "bare + clip_grad_norm_", "trainwarden Guard"
TRANSFORMERS, LIGHTNING = "transformers Trainer", "Lightning Trainer"

Batch = dict[str, torch.Tensor]
Loader = DataLoader[Batch]
Loop = Callable[[Loader, nn.Module], None]


# -- models --------------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """``layers`` square linear layers; returns ``{"loss": mean square of the output}``."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))

    def forward(self, inputs: torch.Tensor) -> Batch:
        return {"loss": self.layers(inputs).square().mean()}


class LanguageModel(nn.Module):
    """A causal transformer; returns ``{"loss": next-token cross entropy}`` for ``inputs`` of token ids."""

    def __init__(self, layers: int, width: int, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True) for _ in range(layers)
        )
        self.head = nn.Linear(width, vocabulary)

    def forward(self, inputs: torch.Tensor) -> Batch:
        mask = nn.Transformer.generate_square_subsequent_mask(inputs.shape[1] - 1, device=inputs.device)
        hidden = self.embed(inputs[:, :-1])
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        logits = self.head(hidden)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), inputs[:, 1:].flatten())}


@dataclass(frozen=True)
class Case:
    """A model with its batch, and how many steps and rounds a measurement of it takes."""

    name: str
    make_model: Callable[[], nn.Module]
    make_inputs: Callable[[], torch.Tensor]
    steps: int
    rounds: int
    uncounted: int = 3


CASES = (
    Case("MLP, 4 tensors", lambda: Chain(2, 16), lambda: torch.randn(8, 16), steps=50, rounds=100),
    Case("MLP, 100 tensors", lambda: Chain(50, 32), lambda: torch.randn(8, 32), steps=20, rounds=60),
    Case(
        "transformer, 1 M parameters",
        lambda: LanguageModel(4, 128, 1024),
        lambda: torch.randint(1024, (4, 65)),
        steps=3,
        rounds=30,
        uncounted=1,
    ),
)


# -- taking turns --------------------------------------------------------------------------------------------------


class _Enough(BaseException):  # not an error: it ends a loop that would run for ever, past every handler
    pass


@dataclass(frozen=True)
class Timing:
    """Seconds per step of one turn: wall clock, and CPU time of the loop's thread."""

    wall_s: float
    cpu_s: float


class TurnTaker(Dataset[Batch]):
    """A training loop in a thread of its own that runs only while it has the turn.

    It is also the loop's data set: fetching a batch is the one thing that every loop does exactly once a step, so
    turns begin and end there.
    """

    def __init__(self, case: Case, train: Loop, *, seed: int, device: str) -> None:
        torch.manual_seed(seed)
        self._model = case.make_model().to(device)
        self._batch: Batch = {"inputs": case.make_inputs().to(device)}
        self._rows = len(self._batch["inputs"])
        self._case = case
        self._train = train
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._stopping = False
        self._fetched = 0
        self._began = (0, 0)
        self._timing: Timing | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __len__(self) -> int:
        return self._rows * 10**6

    def __getitem__(self, index: int) -> Batch:
        raise NotImplementedError("the loader fetches whole batches")

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        self._tick()
        return self._batch

    def start(self) -> None:
        """Runs the loop up to its first turn's end, which is warm-up."""
        self._thread.start()
        self.turn()

    def turn(self) -> Timing:
        """Lets the loop run for one turn. Raises whatever the loop raised."""
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error
        assert self._timing is not None
        return self._timing

    def stop(self) -> None:
        self._stopping = True
        self._go.release()
        self._thread.join()

    def _run(self) -> None:
        self._go.acquire()
        try:
            self._train(DataLoader(self, batch_size=self._rows, collate_fn=_as_it_is), self._model)
        except _Enough:
            pass
        except BaseException as error:  # noqa: BLE001 - boundary of the thread: raised again in `turn`
            self._error = error
            self._done.release()

    def _tick(self) -> None:
        if self._fetched == self._case.uncounted:
            self._began = (time.perf_counter_ns(), time.thread_time_ns())
        elif self._fetched == self._case.uncounted + self._case.steps:
            wall, cpu = time.perf_counter_ns() - self._began[0], time.thread_time_ns() - self._began[1]
            self._timing = Timing(wall / self._case.steps * 1e-9, cpu / self._case.steps * 1e-9)
            self._fetched = 0
            self._done.release()
            self._go.acquire()
            if self._stopping:
                raise _Enough
        self._fetched += 1


def _as_it_is(batch: Any) -> Any:
    return batch


# -- contestants ---------------------------------------------------------------------------------------------------


def fused_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def bare(loader: Loader, model: nn.Module) -> None:
    optimizer = fused_adamw(model)
    for batch in loader:
        model(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


def bare_with_clip(loader: Loader, model: nn.Module) -> None:
    optimizer = fused_adamw(model)
    for batch in loader:
        model(**batch)["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        optimizer.step()
        optimizer.zero_grad()


def guarded(loader: Loader, model: nn.Module) -> None:
    optimizer = fused_adamw(model)

    def compute_loss(batch: Batch) -> torch.Tensor:
        loss: torch.Tensor = model(**batch)["loss"]
        return loss

    with tempfile.TemporaryDirectory() as directory:
        guard = Guard(Path(directory) / "run")
        with guard.watch(model=model, optimizer=optimizer):
            for batch in guard.batches(loader, max_steps=10**6):
                guard.backward(compute_loss, batch)
                optimizer.step()
                optimizer.zero_grad()


def transformers_loop(loader: Loader, model: nn.Module) -> None:
    from transformers import Trainer, TrainingArguments

    rows = loader.batch_size or 1
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory, per_device_train_batch_size=rows, max_steps=10**6, learning_rate=1e-4,
            lr_scheduler_type="constant", optim="adamw_torch_fused", max_grad_norm=0.0,
            train_sampling_strategy="sequential", use_cpu=_device_of(model) == "cpu", logging_strategy="no",
            logging_nan_inf_filter=False, save_strategy="no", report_to=[], disable_tqdm=True,
            remove_unused_columns=False, dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=loader.dataset, data_collator=_as_it_is).train()


def lightning_loop(loader: Loader, model: nn.Module) -> None:
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # the import has set it to INFO

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Batch) -> torch.Tensor:
            loss: torch.Tensor = self.model(**batch)["loss"]
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return fused_adamw(self.model)

    trainer = lightning.Trainer(
        accelerator="cpu" if _device_of(model) == "cpu" else "gpu",
        devices=1,
        max_steps=10**6,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), loader)


def _device_of(model: nn.Module) -> str:
    return next(model.parameters()).device.type


def contestants() -> dict[str, Loop]:
    """The loops whose package is installed, the bare one first."""
    loops: dict[str, Loop] = {BARE: bare, CLIP: bare_with_clip, GUARD: guarded}
    peers = {TRANSFORMERS: ("transformers", transformers_loop), LIGHTNING: ("lightning", lightning_loop)}
    for name, (package, loop) in peers.items():
        if benchkit.installed(package):
            loops[name] = loop
        else:
            print(f"{name}: left out, {package} is not installed", file=sys.stderr)
    return loops


# -- measurement ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over the rounds."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        lower, median, upper = statistics.quantiles(values, n=4)
        return cls(median, lower, upper)


@dataclass(frozen=True)
class Measurement:
    """One contestant on one model, in microseconds per step; ``added`` and ``ratio`` are against the bare loop.

    ``least`` is the quickest round: the figure that other work on the machine disturbs least.
    """

    case: str
    contestant: str
    rounds: int
    steps_a_round: int
    wall_us: Spread
    cpu_us: Spread
    least_cpu_us: float
    added_least_cpu_us: float
    added_wall_us: Spread
    added_cpu_us: Spread
    ratio_wall: Spread
    ratio_cpu: Spread


def measure(case: Case, loops: Mapping[str, Loop], *, seed: int, device: str = "cpu") -> list[Measurement]:
    """Lets the loops take turns for ``case.rounds`` rounds; ``loops`` must hold the bare one."""
    takers = {name: TurnTaker(case, loop, seed=seed, device=device) for name, loop in loops.items()}
    timings: dict[str, list[Timing]] = {name: [] for name in loops}
    for taker in takers.values():
        taker.start()
    names = list(takers)
    for round_index in range(case.rounds):
        # The order rotates, so that no loop always follows the same neighbour.
        first = round_index % len(names)
        for name in names[first:] + names[:first]:
            timings[name].append(takers[name].turn())
    for taker in takers.values():
        taker.stop()
    return [_measurement(case, name, timings[name], timings[BARE]) for name in loops]


def _measurement(case: Case, name: str, own: Sequence[Timing], base: Sequence[Timing]) -> Measurement:
    pairs = list(zip(own, base, strict=True))
    return Measurement(
        case=case.name,
        contestant=name,
        rounds=case.rounds,
        steps_a_round=case.steps,
        wall_us=Spread.of([t.wall_s * 1e6 for t in own]),
        cpu_us=Spread.of([t.cpu_s * 1e6 for t in own]),
        least_cpu_us=min(t.cpu_s for t in own) * 1e6,
        added_least_cpu_us=(min(t.cpu_s for t in own) - min(t.cpu_s for t in base)) * 1e6,
        added_wall_us=Spread.of([(t.wall_s - b.wall_s) * 1e6 for t, b in pairs]),
        added_cpu_us=Spread.of([(t.cpu_s - b.cpu_s) * 1e6 for t, b in pairs]),
        ratio_wall=Spread.of([t.wall_s / b.wall_s for t, b in pairs]),
        ratio_cpu=Spread.of([t.cpu_s / b.cpu_s for t, b in pairs]),
    )


def profile(case: Case, *, seed: int, device: str, steps: int = 500) -> None:
    """Prints where the guarded loop of ``case`` spends its time, by function. The profiler itself inflates calls."""
    profiler = cProfile.Profile()

    def profiled(loader: Loader, model: nn.Module) -> None:
        profiler.enable()
        guarded(loader, model)

    taker = TurnTaker(case, profiled, seed=seed, device=device)
    taker.start()
    for _ in range(max(1, steps // case.steps)):
        taker.turn()
    taker.stop()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("cumulative").print_stats("trainwarden", 25)


# -- results -------------------------------------------------------------------------------------------------------

COLUMNS = (
    "model",
    "contestant",
    "CPU µs/step",
    "added CPU µs",
    "added, least",
    "ratio CPU",
    "added wall µs",
    "ratio wall",
)


def table(measurements: Sequence[Measurement]) -> str:
    return benchkit.markdown_table(COLUMNS, [_row(m) for m in measurements])


def _row(m: Measurement) -> list[str]:
    if m.contestant == BARE:
        return [m.case, m.contestant, f"{m.cpu_us.median:.0f}", "–", "–", "1", "–", "1"]
    return [
        m.case,
        m.contestant,
        f"{m.cpu_us.median:.0f}",
        _with_spread(m.added_cpu_us, ".0f"),
        f"{m.added_least_cpu_us:.0f}",
        _with_spread(m.ratio_cpu, ".3f"),
        _with_spread(m.added_wall_us, ".0f"),
        _with_spread(m.ratio_wall, ".3f"),
    ]


def _with_spread(spread: Spread, form: str) -> str:
    return f"{spread.median:{form}} ({spread.lower:{form}} … {spread.upper:{form}})"


def guard_added_us(measurements: Sequence[Measurement]) -> dict[str, dict[str, float]]:
    """Host time that the Guard adds to a step, by model: CPU time, the median over rounds and the quickest rounds."""
    return {
        m.case: {"median": m.added_cpu_us.median, "least": m.added_least_cpu_us}
        for m in measurements
        if m.contestant == GUARD
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures every case; exit status 1 when the Guard adds more than its limit to the smallest model's step."""
    command_line = benchkit.parser(__doc__ or "")
    command_line.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    command_line.add_argument("--profile", action="store_true", help="print where the Guard spends its time instead")
    options = command_line.parse_args(arguments)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as home:
        benchkit.prepare_process(home)
        if options.profile:
            for case in CASES:
                print(f"== {case.name}")
                profile(case, seed=options.seed, device=options.device)
            return 0
        loops = contestants()
        found = [m for c in CASES for m in measure(c, loops, seed=options.seed, device=options.device)]
    return _report(found, options.seed, options.device, options.output)


def _report(found: Sequence[Measurement], seed: int, device: str, output: Path) -> int:
    packages = ["trainwarden", "torch", "accelerate", "transformers", "lightning"]
    command = f"python benchmarks/step_overhead.py --seed {seed} --device {device}"
    facts = benchkit.environment(command, device, packages)
    added = guard_added_us(found)
    smallest = added[CASES[0].name]
    benchkit.write_json(
        output / "step_overhead.json",
        {
            "environment": facts,
            "seed": seed,
            "limit_us": LIMIT_US,
            "guard_added_us": added,
            "measurements": [asdict(m) for m in found],
        },
    )
    text = table(found)
    (output / "step_overhead.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    verdict = "under" if smallest["median"] < LIMIT_US else "NOT under"
    print(
        f"\nThe Guard adds {smallest['median']:.0f} µs of host time to a step of the smallest model "
        f"({smallest['least']:.0f} in the quickest rounds): {verdict} the limit of {LIMIT_US:.0f} µs"
    )
    return 0 if smallest["median"] < LIMIT_US else 1


if __name__ == "__main__":
    sys.exit(main())
