"""What the ranks of `RankPool` are asked to do by the tests of data-parallel training."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from tests.train.offload_ranks import faulty_observers, written_below


def train(
    rank: int, model: Any, rows: Any, output_dir: Path, settings: Mapping[str, Any], **faults: Any
) -> dict[str, Any]:
    """One training on this rank, as a launcher starts it: what came of it, as plain values.

    ``faults``: ``signal=(rank, step, number)``; ``nan=(rank, step)``; ``memory=(rank, step, rows, phase)``, the rows
    that fit on that rank from that step on; ``evaluation=(rank, rows)``, those that fit in an evaluation;
    ``bad_rows=(rank, step)``, whose loss is NaN whenever they come.
    """
    from trainwarden import Trainer

    events: list[Any] = []
    with launched(rank), written_below(output_dir) as written:
        kind: Any = type("Faulty", (Trainer,), {"compute_loss": faulty_loss(Trainer, rank, faults, events)})
        observers = [events.append, *faulty_observers(rank, faults)]
        trainer = kind(model, rows, output_dir=output_dir, **{**settings, "observers": observers})
        result = trainer.train()
    return {
        "result": result,
        "events": [type(event).__name__ for event in events],
        "texts": [str(event) for event in events],
        "losses": [event.loss for event in events if type(event).__name__ == "MetricsLogged"],
        "written": written,
    }


def faulty_loss(base: Any, rank: int, faults: Mapping[str, Any], events: list[Any]) -> Callable[..., Any]:
    import torch

    from trainwarden.testing import MemoryCeiling, NonFinite, out_of_memory_error

    def steps_completed() -> int:
        return max((event.step for event in events), default=0)

    wraps: list[Any] = []
    if "memory" in faults and faults["memory"][0] == rank:
        _, step, rows, phase = faults["memory"]
        wraps.append(MemoryCeiling(rows, from_step=step, phase=phase, steps_completed=steps_completed))
    if "nan" in faults and faults["nan"][0] == rank:
        wraps.append(NonFinite({faults["nan"][1]}, steps_completed=steps_completed))
    bad: list[Any] = []
    evaluated = faults["evaluation"][1] if faults.get("evaluation", (None,))[0] == rank else None

    def compute_loss(self: Any, model: Any, batch: Any) -> Any:
        if evaluated is not None and not torch.is_grad_enabled() and len(batch["labels"]) > evaluated:
            raise out_of_memory_error()
        if faults.get("bad_rows") == (rank, steps_completed() + 1) and not bad and torch.is_grad_enabled():
            bad.append(batch["input_ids"].clone())
        loss: Any = lambda part: base.compute_loss(self, model, part)  # noqa: E731 - wrapped by each fault in turn
        for wrap in wraps:
            loss = wrap(loss)
        spoiled = bool(bad) and torch.equal(bad[0], batch["input_ids"])
        return loss(batch) * (float("nan") if spoiled else 1.0)

    return compute_loss


@contextmanager
def launched(rank: int, **changes: str) -> Iterator[None]:
    """The variables that a launcher sets; the ranks have met already."""
    import torch.distributed as dist

    size = dist.get_world_size()
    said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in said.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT="29999")
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def command(rank: int, arguments: list[str]) -> tuple[int, str, str]:
    """``warden`` on this rank: its exit status, and what it said."""
    from trainwarden.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with launched(rank), redirect_stdout(out), redirect_stderr(err):
        status = main(arguments)
    return status, out.getvalue(), err.getvalue()


def launch_half(rank: int, **changes: str) -> None:
    """`data_parallel` under variables that do not go together."""
    import torch

    from trainwarden.train.precision import choose_precision
    from trainwarden.train.processes import data_parallel

    cpu = torch.device("cpu")
    with launched(rank, **changes), data_parallel(cpu, choose_precision("float32", cpu, "full"), 0):
        pass
