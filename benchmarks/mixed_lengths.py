"""A stream of batches of mixed lengths under a real memory limit: what each way of fitting them in costs.

Every contestant trains the same small language model on the same rows in the same order, 16 rows a batch, each batch
padded to its longest row, in a process of its own whose address space is limited (``RLIMIT_AS``) to what it takes
before training plus `HEADROOM_MIB`: the allocator itself refuses what does not fit. The longest batches would need
several times that.

- **Guard**: an ordinary loop with ``guard.backward``.
- **best fixed micro-batch**: a loop that runs every batch in micro-batches of the same number of rows, weighted by
  their targets. That number is searched for: every one that survives the longest batches is timed on a part of the
  stream, and the quickest is run on all of it. It stands for what a person finds who tries them all beforehand.
- **accelerate**: ``find_executable_batch_size`` as documented, each attempt builds everything anew.
- **transformers**: ``Trainer(auto_find_batch_size=True)``.

An out-of-memory error is counted when a forward or backward pass throws one, whoever catches it. "Run" are samples that
entered a training forward pass. Throughput is samples due over CPU time of the whole run, restarts and failed attempts
included: on a machine that others use too, CPU time tells more than the clock, which is in the JSON. The Guard and the
best fixed micro-batch run at the same time, so that other work disturbs both alike, and that `TURNS` times: the
quickest run of each is compared, and the one with most errors counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import benchkit
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from trainwarden import Guard, is_out_of_memory, target_tokens
from trainwarden.runtime.split import split_rows

ROWS, BATCHES, EARLY = 16, 1000, 20
LONGEST, VOCABULARY, WIDTH, LAYERS, HEADS = 128, 1024, 64, 2, 4
HEADROOM_MIB = 24
LEARNING_RATE = 1e-3
PAD, IGNORED = 0, -100
LIMIT_RATIO, LIMIT_OOMS = 0.9, 1
TURNS = 2

Batch = Mapping[str, torch.Tensor]
GUARD, FIXED = "trainwarden Guard", "best fixed micro-batch"
ACCELERATE, TRANSFORMERS = "accelerate", "transformers"

# Each tensor is mapped by itself and unmapped when freed, so that what is in use is what counts against the limit. With
# a larger threshold tensors share a heap, whose fragments make the largest size that fits waver by more than a tenth.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


# -- what is trained -----------------------------------------------------------------------------------------------


class Texts(Dataset[torch.Tensor]):
    """Rows of random tokens, int64, of lengths spread as those of text are: most short, a few at the longest."""

    def __init__(self, count: int, seed: int) -> None:
        draw = random.Random(seed)
        lengths = [min(LONGEST, 8 + int(draw.lognormvariate(3.2, 0.7))) for _ in range(count)]
        generator = torch.Generator().manual_seed(seed)
        self.rows = [torch.randint(1, VOCABULARY, (length + 1,), generator=generator) for length in lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.rows[index]


def collate(rows: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``labels`` [rows, longest], int64; the label of padding is -100."""
    longest = max(len(row) for row in rows) - 1
    tokens = torch.full((len(rows), longest), PAD)
    labels = torch.full((len(rows), longest), IGNORED)
    for index, row in enumerate(rows):
        tokens[index, : len(row) - 1] = row[:-1]
        labels[index, : len(row) - 1] = row[1:]
    return {"input_ids": tokens, "labels": labels}


class LanguageModel(nn.Module):
    """A causal transformer; ``forward`` returns the mean loss over the labels that count."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        length = input_ids.shape[1]
        hidden = self.embed(input_ids) + self.position.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        logits = self.head(hidden)
        return {"loss": functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)}


@dataclass
class Record:
    """What one contestant did, written down by hooks that are the same for all; also the result of its process."""

    contestant: str
    batches: int
    seed: int
    micro_batch_size: int | None = None
    batches_begun: int = 0
    samples_run: int = 0
    ooms_at: list[int] = field(default_factory=list)
    """For each out-of-memory error, the batch in which it was thrown, counted from 1 over all attempts."""
    attempts: list[int] = field(default_factory=list)
    optimizer_steps: int = 0
    last_step_samples: int = 0
    passes: list[tuple[int, int, int]] = field(default_factory=list)
    """Batch, rows and length of each training forward pass."""
    cpu_s: float = 0.0
    wall_s: float = 0.0
    survived: bool = False
    _since_step: int = 0

    @property
    def samples_due(self) -> int:
        return self.batches * ROWS

    @property
    def effective_batch(self) -> int:
        """Samples behind an optimizer step in the end; of those that start over, the batch size of the last attempt,
        whose very last batch may be a rest."""
        return self.last_step_samples if len(self.attempts) == 1 else self.attempts[-1]

    def collate(self, rows: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        self.batches_begun += 1
        return collate(rows)

    def compute_loss(self, model: nn.Module) -> Callable[[Batch], torch.Tensor]:
        def compute(batch: Batch) -> torch.Tensor:
            if torch.is_grad_enabled():
                rows, length = batch["input_ids"].shape
                self.passes.append((self.batches_begun, rows, length))
                self.samples_run += rows
                self._since_step += rows
            with self.counting():
                loss: torch.Tensor = model(**batch)["loss"]
            return loss

        return compute

    def counting(self) -> _CountOutOfMemory:
        return _CountOutOfMemory(self)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        def note(*_: Any) -> None:
            self.optimizer_steps += 1
            self.last_step_samples, self._since_step = self._since_step, 0

        optimizer.register_step_post_hook(note)

    def begin_attempt(self, batch_size: int) -> None:
        self.attempts.append(batch_size)
        self._since_step = 0


class _CountOutOfMemory:
    """Notes an out-of-memory error that leaves its block."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        if error is not None and is_out_of_memory(error):
            self._record.ooms_at.append(self._record.batches_begun)


def count_backward_failures(record: Record) -> None:
    """Backward passes are counted too, whoever starts them."""
    original = torch.Tensor.backward

    def backward(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        with record.counting():
            original(self, *args, **kwargs)  # type: ignore[no-untyped-call]

    torch.Tensor.backward = backward  # type: ignore[method-assign, assignment]


# -- the limit -----------------------------------------------------------------------------------------------------


def warm_up(seed: int) -> None:
    """Lets torch allocate whatever it allocates once."""
    model = LanguageModel(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    model(**collate(Texts(2, seed).rows))["loss"].backward()
    optimizer.step()


def limit_memory() -> None:
    """From now on the process may map `HEADROOM_MIB` more than it has mapped, garbage not counted."""
    gc.collect()
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM_MIB * 2**20, hard))


def lift_limit() -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


# -- contestants ---------------------------------------------------------------------------------------------------


def guarded(record: Record, texts: Dataset[torch.Tensor]) -> None:
    model = LanguageModel(record.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    record.watch(optimizer)
    record.begin_attempt(ROWS)
    compute_loss = record.compute_loss(model)
    loader = DataLoader(texts, batch_size=ROWS, collate_fn=record.collate)
    with tempfile.TemporaryDirectory() as directory:
        guard = Guard(Path(directory) / "run", checkpoint_every_s=None)
        with guard.watch(model=model, optimizer=optimizer):
            limit_memory()
            for batch in guard.batches(loader, max_steps=record.batches):
                guard.backward(compute_loss, batch, weight=target_tokens)
                optimizer.step()
                optimizer.zero_grad()
            lift_limit()


def fixed(record: Record, texts: Dataset[torch.Tensor]) -> None:
    assert record.micro_batch_size is not None
    model = LanguageModel(record.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    record.watch(optimizer)
    record.begin_attempt(record.micro_batch_size)
    compute_loss = record.compute_loss(model)
    limit_memory()
    for batch in DataLoader(texts, batch_size=ROWS, collate_fn=record.collate):
        total = target_tokens(batch)
        rows = len(batch["input_ids"])
        full, rest = divmod(rows, record.micro_batch_size)
        for part in split_rows(batch, [record.micro_batch_size] * full + [rest] * bool(rest)):
            (compute_loss(part) * (target_tokens(part) / total)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


def accelerate_loop(record: Record, texts: Dataset[torch.Tensor]) -> None:
    from accelerate.utils import find_executable_batch_size

    @find_executable_batch_size(starting_batch_size=ROWS)  # type: ignore[untyped-decorator]
    def train(batch_size: int) -> None:
        model = LanguageModel(record.seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
        record.watch(optimizer)
        record.begin_attempt(batch_size)
        if len(record.attempts) == 1:
            limit_memory()
        compute_loss = record.compute_loss(model)
        for batch in DataLoader(texts, batch_size=batch_size, collate_fn=record.collate):
            compute_loss(batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()

    train()


def transformers_loop(record: Record, texts: Dataset[torch.Tensor]) -> None:
    from transformers import TrainerCallback, TrainingArguments

    model = LanguageModel(record.seed)
    trainer_class = benchkit.observed_trainer(record.compute_loss(model), record.watch)

    class Limit(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            record.begin_attempt(state.train_batch_size)
            if len(record.attempts) == 1:
                limit_memory()

    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory, per_device_train_batch_size=ROWS, auto_find_batch_size=True, num_train_epochs=1,
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant", optim="adamw_torch", max_grad_norm=0.0,
            train_sampling_strategy="sequential", use_cpu=True, logging_strategy="no", save_strategy="no",
            report_to=[], disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer_class(
            model=model, args=arguments, train_dataset=texts, data_collator=record.collate, callbacks=[Limit()]
        ).train()
        lift_limit()


LOOPS: dict[str, Callable[[Record, Dataset[torch.Tensor]], None]] = {
    GUARD: guarded,
    FIXED: fixed,
    ACCELERATE: accelerate_loop,
    TRANSFORMERS: transformers_loop,
}


def run_here(record: Record, *, worst_first: int = 0) -> Record:
    """One contestant in this process, which is limited from then on. ``worst_first``: only that many of the batches
    with most tokens."""
    texts: Any = Texts(record.batches * ROWS, record.seed)
    if worst_first:
        groups = [texts.rows[i : i + ROWS] for i in range(0, len(texts), ROWS)]
        groups.sort(key=lambda rows: -max(len(row) for row in rows))
        texts.rows = [row for rows in groups[:worst_first] for row in rows]
    warm_up(record.seed)
    count_backward_failures(record)
    began_cpu_s, began_s = time.process_time(), time.perf_counter()
    try:
        LOOPS[record.contestant](record, texts)
        record.survived = True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    finally:
        lift_limit()
    record.cpu_s, record.wall_s = time.process_time() - began_cpu_s, time.perf_counter() - began_s
    return record


def run_in_child(record: Record, *, worst_first: int = 0) -> Record:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--contestant", record.contestant, "--batches", str(record.batches)]
    command += ["--seed", str(record.seed), "--worst-first", str(worst_first)]
    if record.micro_batch_size is not None:
        command += ["--micro-batch-size", str(record.micro_batch_size)]
    done = subprocess.run(command, env={**os.environ, **ALLOCATOR}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{record.contestant} ended with status {done.returncode}:\n{done.stderr[-4000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    result["passes"] = [tuple(each) for each in result["passes"]]
    return Record(**result)


# -- the best fixed micro-batch ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """One fixed micro-batch: whether the longest batches fit, and how quick it is on the beginning of the stream."""

    micro_batch_size: int
    survives: bool
    cpu_s: float | None


def search_fixed(seed: int, *, timed_batches: int = 60, worst: int = 8) -> Iterator[Candidate]:
    """Every size from 1 up to the first that does not survive."""
    for size in range(1, ROWS + 1):
        if not run_in_child(Record(FIXED, BATCHES, seed, size), worst_first=worst).survived:
            yield Candidate(size, False, None)
            return
        timed = run_in_child(Record(FIXED, timed_batches, seed, size))
        yield Candidate(size, timed.survived, timed.cpu_s if timed.survived else None)


def best_fixed(candidates: Sequence[Candidate]) -> list[int]:
    """The sizes that survive, the quickest first."""
    surviving = [c for c in candidates if c.survives and c.cpu_s is not None]
    return [c.micro_batch_size for c in sorted(surviving, key=lambda c: c.cpu_s or 0.0)]


# -- results -------------------------------------------------------------------------------------------------------

COLUMNS = (
    "contestant", "samples run per sample due", "OOMs thrown", f"after {EARLY} batches", "attempts", "effective batch",
    "optimizer steps", "throughput to best fixed",
)  # fmt: skip


def late_ooms(record: Record) -> int:
    return sum(batch > EARLY for batch in record.ooms_at)


def throughput_ratio(record: Record, reference: Record) -> float:
    """Samples due per second of CPU time, over the best fixed micro-batch's."""
    return (record.samples_due / record.cpu_s) / (reference.samples_due / reference.cpu_s)


def table(records: Sequence[Record]) -> str:
    reference = next(r for r in records if r.contestant == FIXED)
    return benchkit.markdown_table(COLUMNS, [_row(record, reference) for record in records])


def _row(record: Record, reference: Record) -> list[str]:
    attempts = " → ".join(map(str, record.attempts))
    return [
        f"{FIXED} ({record.micro_batch_size})" if record is reference else record.contestant,
        f"{record.samples_run / record.samples_due:.3f}",
        str(len(record.ooms_at)),
        str(late_ooms(record)),
        "1" if len(record.attempts) == 1 else attempts,
        str(record.effective_batch),
        str(record.optimizer_steps),
        f"{throughput_ratio(record, reference):.2f}",
    ]


def holds(records: Sequence[Record]) -> bool:
    """What the Guard promises: at most one error after the first batches, nearly the best throughput, all samples."""
    ours = next(r for r in records if r.contestant == GUARD)
    reference = next(r for r in records if r.contestant == FIXED)
    return (
        ours.survived
        and ours.optimizer_steps == ours.batches
        and ours.effective_batch == ROWS
        and ours.ooms_at != []
        and late_ooms(ours) <= LIMIT_OOMS
        and throughput_ratio(ours, reference) >= LIMIT_RATIO
    )


def plot(records: Sequence[Record], path: Path) -> None:
    """Errors thrown over the stream, and the sizes that the Guard ran the batches in."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (errors, sizes) = plt.subplots(1, 2, figsize=(13, 4.4), layout="constrained")
    colours = {GUARD: "#0b7a4b", FIXED: "0.6", ACCELERATE: "#d95f02", TRANSFORMERS: "#7570b3"}
    for record in records:
        steps = [0, *record.ooms_at, record.batches_begun]
        counts = [*range(len(record.ooms_at) + 1), len(record.ooms_at)]
        errors.step(steps, counts, where="post", label=record.contestant, color=colours[record.contestant])
    errors.set(xlabel="batches begun, over all attempts", ylabel="out-of-memory errors thrown so far")
    errors.legend(fontsize=8)
    ours = next(r for r in records if r.contestant == GUARD)
    whole = {batch: length * ROWS for batch, _, length in ours.passes}
    sizes.plot(list(whole), list(whole.values()), ".", color="0.8", markersize=3, label="tokens of the batch")
    sizes.plot(
        [batch for batch, _, _ in ours.passes], [rows * length for _, rows, length in ours.passes],
        ".", color=colours[GUARD], markersize=3, label="tokens of each micro-batch, Guard",
    )  # fmt: skip
    for batch in ours.ooms_at:
        sizes.axvline(
            batch, color="#b2182b", linewidth=0.8, label="out of memory" if batch == ours.ooms_at[0] else None
        )
    sizes.set(xlabel="batch", ylabel="rows × length")
    sizes.legend(fontsize=8)
    for axis in (errors, sizes):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{ours.batches} batches of {ROWS} rows of mixed lengths, {HEADROOM_MIB} MiB for activations")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def compare(seed: int, batches: int) -> tuple[list[Record], list[Candidate]]:
    """The search for the best fixed micro-batch, and the runs of all contestants."""
    candidates = list(search_fixed(seed))
    size = next(size for size in best_fixed(candidates) if _run(Record(FIXED, batches, seed, size)).survived)
    pair = Record(GUARD, batches, seed), Record(FIXED, batches, seed, size)
    with ThreadPoolExecutor(max_workers=2) as both:
        turns = [list(both.map(_run, pair)) for _ in range(TURNS)]
    records = [typical(runs) for runs in zip(*turns, strict=True)]
    for name, package in ((ACCELERATE, "accelerate"), (TRANSFORMERS, "transformers")):
        if benchkit.installed(package):
            records.append(_run(Record(name, batches, seed)))
        else:
            print(f"{name}: left out, {package} is not installed", file=sys.stderr)
    return records, candidates


def typical(runs: Sequence[Record]) -> Record:
    """The run with the most late errors, then the most, with the times of the quickest: what disturbs it least."""
    worst = max(runs, key=lambda run: (late_ooms(run), len(run.ooms_at)))
    quickest = min(runs, key=lambda run: run.cpu_s)
    return replace(worst, cpu_s=quickest.cpu_s, wall_s=quickest.wall_s, survived=all(run.survived for run in runs))


def _run(record: Record) -> Record:
    done = run_in_child(record)
    size = f" of {record.micro_batch_size}" if record.micro_batch_size else ""
    errors = f"{len(done.ooms_at)} OOMs at batches {done.ooms_at}"
    print(f"{record.contestant}{size}: {done.cpu_s:.1f} s of CPU time, {errors}", file=sys.stderr, flush=True)
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison; exit status 1 when the Guard does not keep its promise."""
    command_line = benchkit.parser(__doc__ or "")
    command_line.add_argument("--batches", type=int, default=BATCHES, help="batches of the stream (default 1000)")
    for hidden in ("--contestant", "--micro-batch-size", "--worst-first"):
        kind = str if hidden == "--contestant" else int
        command_line.add_argument(hidden, type=kind, default=None, help=argparse.SUPPRESS)
    options = command_line.parse_args(arguments)
    with tempfile.TemporaryDirectory() as home:
        benchkit.prepare_process(home)
        if options.contestant:
            record = Record(options.contestant, options.batches, options.seed, options.micro_batch_size)
            print(json.dumps(asdict(run_here(record, worst_first=options.worst_first or 0))))
            return 0
        records, candidates = compare(options.seed, options.batches)
    return _report(records, candidates, options)


def _report(records: Sequence[Record], candidates: Sequence[Candidate], options: argparse.Namespace) -> int:
    text = table(records)
    print(text)
    command = f"python benchmarks/mixed_lengths.py --seed {options.seed} --batches {options.batches}"
    facts = benchkit.environment(command, "cpu", ["trainwarden", "torch", "accelerate", "transformers"])
    reference = next(r for r in records if r.contestant == FIXED)
    outcomes = [_outcome(record, reference) for record in records]
    result = {
        "environment": facts,
        "seed": options.seed,
        "headroom_mib": HEADROOM_MIB,
        "fixed_candidates": [asdict(candidate) for candidate in candidates],
        "outcomes": outcomes,
    }
    benchkit.write_json(options.output / "mixed_lengths.json", result)
    (options.output / "mixed_lengths.md").write_text(text + "\n", encoding="utf-8")
    if benchkit.installed("matplotlib"):
        plot(records, options.output / "mixed_lengths.png")
    kept = holds(records)
    print(f"\nGuard keeps its promise: {'yes' if kept else 'NO'}")
    return 0 if kept else 1


def _outcome(record: Record, reference: Record) -> dict[str, Any]:
    facts = {key: value for key, value in asdict(record).items() if key not in ("passes", "_since_step")}
    return {
        **facts,
        "samples_due": record.samples_due,
        "effective_batch": record.effective_batch,
        "ooms_late": late_ooms(record),
        "passes": len(record.passes),
        "throughput_ratio": throughput_ratio(record, reference),
        "throughput_ratio_wall": reference.wall_s / record.wall_s * record.samples_due / reference.samples_due,
    }


if __name__ == "__main__":
    sys.exit(main())
