"""What a finished training hands back."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The outcome of `Trainer.train`. ``None`` means *unknown* or *not asked for*, never zero.

    The losses are those of the log lines, which are means over the steps since the line before, skipped ones
    left out: ``first_loss`` that of the first line (step 1), ``final_loss`` of the last, ``best_loss`` the
    lowest; ``mean_loss`` is over all steps. NaN when every step concerned was skipped. All of them, and
    ``tokens`` (without padding), cover the whole run, also before a resume; ``wall_s`` is the time of this
    call.
    """

    status: Literal["finished"] = "finished"
    run_id: str
    run_dir: str
    steps_completed: int
    steps_skipped: int
    shrinks: int
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
    exit_code: int = 0

    def to_dict(self) -> dict[str, Any]:
        """A flat JSON-serialisable object; NaN and infinity as the strings ``"nan"`` and ``"inf"``."""
        fields = dataclasses.asdict(self)
        return {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in fields.items()}
