"""The returns of a run, written down in its directory before anything else happens: ``rollbacks.json``.

The file is what makes a return survive a restart: it names the checkpoint to go back to, the batches to leave out and
the learning-rate factor. A checkpoint remembers how many of the returns it has behind it; those that it has not are
carried out when it is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from trainwarden.checkpoint.durable import fsync_directory, replace_file, save_errors
from trainwarden.checkpoint.layout import is_checkpoint, slots_in
from trainwarden.checkpoint.removal import remove_checkpoint
from trainwarden.errors import CheckpointError
from trainwarden.guards.rollback import Rollback

FILE = "rollbacks.json"

_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
"""What torch's schedulers keep of learning rates in a parameter group."""


def read(run_dir: Path) -> list[Rollback]:
    """The returns of the run so far, oldest first. Raises CheckpointError when they cannot be read."""
    path = run_dir / FILE
    if not path.exists():
        return []
    try:
        return [Rollback.from_dict(record) for record in json.loads(path.read_text(encoding="utf-8"))["rollbacks"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(operation="load", path=path, problem=f"{type(error).__name__}: {error}") from error


def write(run_dir: Path, rollbacks: Sequence[Rollback]) -> None:
    """Writes all returns, whole or not at all, and waits for the disk. Raises DiskFullError or CheckpointError."""
    path = run_dir / FILE
    text = json.dumps({"rollbacks": [rollback.to_dict() for rollback in rollbacks]}, indent=1)
    with save_errors(path, needed_bytes=len(text)):
        replace_file(path, [text.encode()])
        fsync_directory(run_dir)


def checkpoint_steps(checkpoints: Path) -> list[int]:
    """The steps of which there is a checkpoint, damaged ones included."""
    return [slot.step for slot in slots_in(checkpoints) if is_checkpoint(checkpoints / slot.name)]


def drop_newer(checkpoints: Path, step: int) -> None:
    """Removes the checkpoints of more than ``step`` steps: they hold what the run goes back from."""
    for slot in slots_in(checkpoints):
        if slot.step > step:
            with suppress(OSError):  # what could not go is passed over again by the next start
                remove_checkpoint(checkpoints / slot.name, ())


def scale_learning_rates(optimizers: Iterable[torch.optim.Optimizer], others: Mapping[str, Any], factor: float) -> None:
    """Multiplies every learning rate, and what the schedulers among ``others`` compute later ones from."""
    if factor == 1.0:
        return
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for key in _RATES:
                if key in group:
                    group[key] = group[key] * factor
    for other in others.values():
        _scale_scheduler(other, factor)


def _scale_scheduler(scheduler: Any, factor: float) -> None:
    for key in ("base_lrs", "_last_lr"):
        rates = getattr(scheduler, key, None)
        if isinstance(rates, list):
            setattr(scheduler, key, [rate * factor for rate in rates])
    for inner in getattr(scheduler, "_schedulers", ()):  # of SequentialLR and ChainedScheduler
        _scale_scheduler(inner, factor)
