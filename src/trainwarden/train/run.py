"""From a configuration file's content to a finished training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainwarden.events import Observer
from trainwarden.train.config import TrainConfig
from trainwarden.train.result import TrainResult
from trainwarden.train.trainer import Trainer


def trainer_from_config(
    config: TrainConfig, /, *, observers: Sequence[Observer] | None = None, **changes: Any
) -> Trainer:
    """The `Trainer` that a configuration describes. Raises `InvalidSettingError`.

    ``changes`` are arguments of `Trainer` that stand in for what the configuration gives.
    """
    sections: dict[str, Any] = {**config.model.model_dump(), **config.trainer.model_dump(), **config.guard.model_dump()}
    name_or_path, new_model = sections.pop("name_or_path"), sections.pop("config")
    data = config.data
    given = {
        "output_dir": config.output_dir,
        "eval_dataset": data.eval,
        "eval_rows": data.eval_rows,
        "max_length": data.max_length,
        "limit": data.limit,
        "observers": observers,
        "config": config.to_dict(),
        **sections,
        **changes,
    }
    return Trainer(new_model if name_or_path is None else name_or_path, data.train, **given)


def run_from_config(config: TrainConfig, *, observers: Sequence[Observer] | None = None) -> TrainResult:
    """Trains as ``config`` says, for ``warden train`` and ``warden resume``. Errors: see `Trainer.train`."""
    return trainer_from_config(config, observers=observers).train()
