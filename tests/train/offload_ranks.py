"""What the ranks of `RankPool` are asked to do by the tests of offloaded training."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def train(
    rank: int, model: Any, rows: Any, output_dir: Path, settings: Mapping[str, Any], **faults: Any
) -> dict[str, Any]:
    """One offloaded training on this rank: what came of it, as plain values."""
    from trainwarden import Trainer

    events: list[Any] = []
    with gate_open(), written_below(output_dir) as written:
        kind: Any = type("Faulty", (Trainer,), faulty_losses(Trainer, rank, faults, events))
        trainer = kind(
            model,
            rows,
            output_dir=output_dir,
            full_ft_offload=True,
            **{**settings, "observers": [events.append, *faulty_observers(rank, faults)]},
        )
        result = trainer.train()
    return {
        "result": result,
        "events": [type(event).__name__ for event in events],
        "texts": [event.text for event in events if hasattr(event, "text")],
        "losses": [event.loss for event in events if type(event).__name__ == "MetricsLogged"],
        "written": written,
    }


def faulty_observers(rank: int, faults: Mapping[str, Any]) -> list[Callable[[Any], None]]:
    """``signal=(rank, step, number)``: that rank sends itself the signal when the step is completed."""
    if "signal" not in faults:
        return []
    at_rank, at_step, number = faults["signal"]

    def observe(event: Any) -> None:
        if rank == at_rank and type(event).__name__ == "StepCompleted" and event.step == at_step:
            os.kill(os.getpid(), number)

    return [observe]


def faulty_losses(base: Any, rank: int, faults: Mapping[str, Any], events: Sequence[Any]) -> dict[str, Any]:
    """``nan=(rank, step)``, ``memory=(rank, step)``: what that rank's forward passes of that step (from 1) come to."""
    from trainwarden.testing import out_of_memory_error

    def struck(kind: str) -> bool:
        done = sum(type(event).__name__ == "StepCompleted" for event in events)
        return faults.get(kind) == (rank, done + 1)

    def compute_loss(self: Any, model: Any, batch: Any) -> Any:
        loss = base.compute_loss(self, model, batch)
        if struck("memory"):
            raise out_of_memory_error()
        return loss * float("nan") if struck("nan") else loss

    return {"compute_loss": compute_loss}


def shard_a_model(rank: int, source: Path) -> dict[str, Any]:
    """A model that rank 0 loads and the others only describe, put in pieces and together again."""
    import torch

    from trainwarden.runtime.sharded import whole_model_state
    from trainwarden.train.hub import Backoff
    from trainwarden.train.models import load_model
    from trainwarden.train.offload import offloading
    from trainwarden.train.precision import choose_precision

    def load(*, weights: bool) -> Any:
        return load_model(source, dtype=torch.float32, backoff=Backoff(), say=print, weights=weights)

    def is_tied(model: Any) -> bool:
        return bool(model.lm_head.weight is model.get_input_embeddings().weight)

    cpu = torch.device("cpu")
    reference = load(weights=True)
    model = load(weights=rank == 0)
    tied = is_tied(model)
    on_host = [parameter.numel() for parameter in model.parameters() if not parameter.is_meta]
    with offloading(cpu, choose_precision("float32", cpu, "full"), 0) as offload:
        offload.shard(model)
        state = whole_model_state(model)
        expected = reference.state_dict()
        buffers = zip(model.buffers(), reference.buffers(), strict=True)
        return {
            "largest_before": max(on_host, default=0),
            "whole_equal": rank == 0 and all(torch.equal(state[key], expected[key]) for key in expected),
            "state_is_none": all(value is None for value in state.values()),
            "tied": is_tied(model),
            "tied_before": tied,
            "buffers_equal": all(torch.equal(own, other) for own, other in buffers),
        }


@contextmanager
def gate_open() -> Iterator[None]:
    """The gate says yes without its trial, which has tests of its own and starts a process a rank."""
    from trainwarden.capability.verdict import supported
    from trainwarden.train import gates

    original = gates.require_fsdp_offload
    gates.require_fsdp_offload = lambda **_: supported("not tried")  # type: ignore[assignment]
    try:
        yield
    finally:
        gates.require_fsdp_offload = original


_watching: list[tuple[str, list[str]]] = []


@contextmanager
def written_below(folder: Path) -> Iterator[list[str]]:
    """What this process opens for writing, makes, renames or removes below ``folder``, as the interpreter sees it."""
    if not _watching:
        sys.addaudithook(_note_write)  # for good: hooks cannot be taken off
    found: list[str] = []
    _watching.append((str(folder), found))
    try:
        yield found
    finally:
        _watching[-1] = ("\0", [])


def _note_write(event: str, args: tuple[Any, ...]) -> None:
    if not _watching or event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
        return
    folder, found = _watching[-1]
    path = str(args[0])
    writes = event != "open" or any(letter in str(args[1] or "") for letter in "wax+")
    flags = args[2] if event == "open" and isinstance(args[2], int) else 0
    writes = writes or bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if writes and path.startswith(folder):
        found.append(f"{event} {path}")
