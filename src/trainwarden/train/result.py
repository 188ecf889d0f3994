"""What a finished training hands back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The outcome of `Trainer.train`. ``None`` means *unknown* or *not asked for*, never zero.

    The losses are those of the log lines, which are means over the steps since the line before, skipped ones
    left out: ``first_loss`` that of the first line (step 1), ``final_loss`` of the last, ``best_loss`` the
    lowest; ``mean_loss`` is over all steps. NaN when every step concerned was skipped. All of them, and
    ``tokens`` (without padding), cover the whole run, also before a resume; ``wall_s`` is the time of this
    call, and ``rollbacks`` how often it went back to a checkpoint to go on. With several ranks (``world_size``)
    it is the same on all of them: losses and tokens are of all ranks' rows, time, memory, temperature and
    shrinks the most of any rank. ``global_batch_size`` counts the rows of a step on all ranks.
    """

    status: Literal["finished"] = "finished"
    run_id: str
    run_dir: str
    steps_completed: int
    steps_skipped: int
    shrinks: int
    data_skipped: int
    tokens: int
    wall_s: float
    first_loss: float
    final_loss: float
    best_loss: float
    mean_loss: float
    eval_loss: float | None
    peak_memory_bytes: int | None
    max_temperature_c: float | None
    checkpoint_path: str | None
    model_path: str
    rollbacks: int = 0
    world_size: int = 1
    global_batch_size: int | None = None
    exit_code: int = 0

    def to_dict(self) -> dict[str, Any]:
        """A flat JSON-serialisable object; NaN and infinity as the strings ``"nan"`` and ``"inf"``."""
        fields = dataclasses.asdict(self)
        return {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in fields.items()}


def result_of_ranks(results: Sequence[TrainResult]) -> TrainResult:
    """One outcome of the run, from what each rank knows of it, in order of rank."""
    peaks = [result.peak_memory_bytes for result in results]
    temperatures = [result.max_temperature_c for result in results]
    return replace(
        results[0],
        shrinks=max(result.shrinks for result in results),
        data_skipped=max(result.data_skipped for result in results),
        wall_s=max(result.wall_s for result in results),
        peak_memory_bytes=max((peak for peak in peaks if peak is not None), default=None),
        max_temperature_c=max((value for value in temperatures if value is not None), default=None),
    )
