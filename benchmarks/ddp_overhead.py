"""What the guard adds to a step of two DDP ranks, which it exchanges gradients for itself, beside plain DDP.

Two gloo processes train the same transformer on the same batches with fused AdamW, in turns of some steps: plain DDP on
its own reducer, and DDP under a Guard, which keeps DDP in ``no_sync`` and sends buckets of the same size with its own
asynchronous all-reduces, plus one vote a step. The order of the two alternates round by round; a contestant's figure is
the median over rounds of its ratio to plain DDP's turn in the same round, with the quartiles as spread. That both train
the same weights bit for bit is a test (`tests/distributed/test_ddp.py`).

What the guard adds grows with the parameters, what a step takes with parameters times tokens. So the share is shown for
a few tokens a rank, where nobody would use two ranks, and for 4 k tokens, the least that a real job gives one.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import benchkit
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from step_overhead import LanguageModel
from torch.nn.parallel import DistributedDataParallel

from trainwarden import Guard

RANKS = 2
STEPS_A_TURN = 4
UNCOUNTED = 1
"""Steps at the beginning of a turn that are not counted: caches are the other contestant's."""
LIMIT = 1.01


@dataclass(frozen=True)
class Case:
    """A transformer and its batch."""

    name: str
    layers: int
    width: int
    vocabulary: int
    rows: int
    tokens: int
    most_rounds: int = 60


CASES = (
    Case("1 M parameters, 0.5 k tokens a rank", 4, 128, 1024, rows=4, tokens=128),
    Case("4 M parameters, 1 k tokens a rank", 4, 256, 2048, rows=8, tokens=128),
    Case("4 M parameters, 4 k tokens a rank", 4, 256, 2048, rows=16, tokens=256, most_rounds=24),
)


def plain(case: Case, seed: int, _run_dir: Path) -> Iterator[None]:
    """One optimizer step a ``next``."""
    model, optimizer, batch = _parts(case, seed)
    while True:
        model(batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


def guarded(case: Case, seed: int, run_dir: Path) -> Iterator[None]:
    """The same under a Guard whose checkpoints never fall due."""
    model, optimizer, batch = _parts(case, seed)
    guard = Guard(run_dir, checkpoint_every_s=None, observers=[])
    with guard.watch(model=model, optimizer=optimizer):
        for tokens in guard.batches([batch], max_steps=10**6):
            guard.backward(lambda part: model(part)["loss"], tokens)
            optimizer.step()
            optimizer.zero_grad()
            yield


def _parts(case: Case, seed: int) -> tuple[DistributedDataParallel, torch.optim.Optimizer, torch.Tensor]:
    torch.manual_seed(seed)
    model = DistributedDataParallel(LanguageModel(case.layers, case.width, case.vocabulary))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(seed + dist.get_rank())
    return model, optimizer, torch.randint(case.vocabulary, (case.rows, case.tokens + 1), generator=generator)


CONTESTANTS: dict[str, Callable[[Case, int, Path], Iterator[None]]] = {"plain DDP": plain, "guarded DDP": guarded}


def _rank(rank: int, store: str, run_dir: str, rounds: int, seed: int, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    for index, case in enumerate(CASES):
        loops = {name: make(case, seed, Path(run_dir) / f"{index}") for name, make in CONTESTANTS.items()}
        for loop in loops.values():
            next(loop)
        turns: dict[str, list[float]] = {name: [] for name in loops}
        for number in range(min(rounds, case.most_rounds)):
            for name in list(loops)[:: 1 if number % 2 else -1]:
                turns[name].append(_turn(loops[name]))
        if rank == 0:
            answers.put((case.name, turns))
        dist.barrier()
        for loop in loops.values():
            loop.close()
    dist.destroy_process_group()


def _turn(loop: Iterator[None]) -> float:
    """Seconds a step, of the counted ones."""
    dist.barrier()
    for _ in range(UNCOUNTED):
        next(loop)
    began_s = time.perf_counter()
    for _ in range(STEPS_A_TURN):
        next(loop)
    return (time.perf_counter() - began_s) / STEPS_A_TURN


def measure(rounds: int, seed: int) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        processes = multiprocessing.start_processes(
            _rank,
            (f"{folder}/store", f"{folder}/runs", rounds, seed, answers),
            nprocs=RANKS,
            join=False,
            start_method="spawn",
        )
        found = [answers.get() for _ in CASES]
        while not processes.join():
            pass
    return [_summary(case, name, turns) for case, turns in found for name in turns]


def _summary(case: str, name: str, turns: dict[str, list[float]]) -> dict[str, Any]:
    own, base = turns[name], turns["plain DDP"]
    ratios = [a / b for a, b in zip(own, base, strict=True)]
    lower, median, upper = statistics.quantiles(ratios, n=4)
    return {
        "case": case,
        "contestant": name,
        "rounds": len(own),
        "step_ms": statistics.median(own) * 1e3,
        "least_step_ms": min(own) * 1e3,
        "ratio": {"lower": lower, "median": median, "upper": upper},
        "ratio_of_least": min(own) / min(base),
    }


def table(rows: list[dict[str, Any]]) -> str:
    columns = ("model", "contestant", "ms/step", "ratio to plain DDP", "ratio, quickest rounds")
    return benchkit.markdown_table(columns, [_row(row) for row in rows])


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    ratio = row["ratio"]
    spread = f"{ratio['median']:.3f} ({ratio['lower']:.3f} … {ratio['upper']:.3f})"
    alone = row["contestant"] == "plain DDP"
    return (
        row["case"],
        row["contestant"],
        f"{row['step_ms']:.1f}",
        "1" if alone else spread,
        "1" if alone else f"{row['ratio_of_least']:.3f}",
    )


def main() -> int:
    parser = benchkit.parser(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=60, help="turns of each contestant, at most (default 60)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        benchkit.prepare_process(home)
        rows = measure(arguments.rounds, arguments.seed)
    command = f"python benchmarks/ddp_overhead.py --seed {arguments.seed} --rounds {arguments.rounds}"
    text = table(rows)
    print(text)
    benchkit.write_json(
        arguments.output / "ddp_overhead.json",
        {
            "environment": benchkit.environment(command, "cpu", ["torch", "trainwarden"]),
            "cases": [asdict(case) for case in CASES],
            "limit": LIMIT,
            "measurements": rows,
        },
    )
    (arguments.output / "ddp_overhead.md").write_text(text + "\n", encoding="utf-8")
    largest = [row for row in rows if row["contestant"] != "plain DDP"][-1]
    kept = largest["ratio"]["median"] < LIMIT
    print(f"{'kept' if kept else 'NOT KEPT'}: under 1 % of a step of realistic length ({largest['case']})")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
