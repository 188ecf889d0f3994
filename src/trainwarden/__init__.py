"""trainwarden: a training run is lost neither to a preventable failure nor to a bad ending.

Names are imported when they are first used: ``import trainwarden`` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainwarden.guards.data import DataPolicy
    from trainwarden.guards.oom import is_out_of_memory
    from trainwarden.report.console import Console
    from trainwarden.runtime.guard import Guard
    from trainwarden.runtime.split import rows, shifted_target_tokens, target_tokens
    from trainwarden.runtime.unreadable import skip_unreadable
    from trainwarden.train import Trainer, TrainResult

__version__ = "0.1.0"

_HOMES = {
    "Console": "trainwarden.report.console",
    "DataPolicy": "trainwarden.guards.data",
    "Guard": "trainwarden.runtime.guard",
    "Trainer": "trainwarden.train",
    "TrainResult": "trainwarden.train",
    "is_out_of_memory": "trainwarden.guards.oom",
    "rows": "trainwarden.runtime.split",
    "shifted_target_tokens": "trainwarden.runtime.split",
    "skip_unreadable": "trainwarden.runtime.unreadable",
    "target_tokens": "trainwarden.runtime.split",
}

__all__ = [
    "Console",
    "DataPolicy",
    "Guard",
    "TrainResult",
    "Trainer",
    "__version__",
    "is_out_of_memory",
    "rows",
    "shifted_target_tokens",
    "skip_unreadable",
    "target_tokens",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trainwarden' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
