"""Supervised fine-tuning on `Guard`, accelerate and peft.

Names are imported when they are first used, because torch and transformers take seconds to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainwarden.train.result import TrainResult
    from trainwarden.train.run import run_from_config
    from trainwarden.train.trainer import Trainer

_HOMES = {
    "TrainResult": "trainwarden.train.result",
    "Trainer": "trainwarden.train.trainer",
    "run_from_config": "trainwarden.train.run",
}

__all__ = ["TrainResult", "Trainer", "run_from_config"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trainwarden.train' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
