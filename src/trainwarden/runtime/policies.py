"""What a guard was asked to do, and how far its run is: the two things that outlive one ``watch``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trainwarden.guards.data import DataPolicy
from trainwarden.guards.hardware import HardwarePolicies
from trainwarden.guards.ladder import Remedy
from trainwarden.guards.oom import OOMPolicy
from trainwarden.runtime.keeper import CheckpointPolicy
from trainwarden.runtime.numbers import NumberPolicies
from trainwarden.runtime.plan import MicroBatchPlan
from trainwarden.runtime.split import Split

Resume = Literal["auto", "never", "must"]


@dataclass(frozen=True)
class Policies:
    """What a guard was asked to do."""

    oom: OOMPolicy
    numbers: NumberPolicies
    checkpoint: CheckpointPolicy
    resume: Resume
    accept_changes: tuple[str, ...]
    split: Split | None
    verify_split: bool
    save_frozen: bool
    hardware: HardwarePolicies | None
    remedies: Mapping[Remedy, Callable[[], None]]
    data: DataPolicy | None


@dataclass
class Progress:
    """How far a run is."""

    steps_completed: int = 0
    steps_skipped: int = 0
    newest_checkpoint: Path | None = None
    plan: MicroBatchPlan = field(default_factory=MicroBatchPlan)

    def count_skipped(self) -> int:
        """One more step was left out; how many it are now."""
        self.steps_skipped += 1
        return self.steps_skipped
