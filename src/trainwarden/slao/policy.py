"""`MergePolicy`: how adapters are merged, and how much of the i-th one is taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from trainwarden.errors import InvalidSettingError

Mode = Literal["slao", "average", "ties", "dare"]
Schedule = Literal["inverse_sqrt", "inverse", "inverse_log", "constant"]
MODES: tuple[Mode, ...] = get_args(Mode)
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


@dataclass(frozen=True)
class MergePolicy:
    """How the i-th adapter (i ≥ 2; the first is the accumulator's start) goes into the accumulator.

    Attributes:
        mode: ``slao``: A is replaced by that of the new adapter, B moves towards it by λ(i) (Qiao and Mahdavi,
            arXiv 2512.23017). ``average``: A and B both move by λ(i). ``ties``: what is small is dropped from
            both sides and only values of the elected sign are averaged (Yadav et al., arXiv 2306.01708).
            ``dare``: entries of the new adapter are dropped at random and the rest scaled up before it is
            averaged in (Yu et al., arXiv 2311.03099). The last two treat A and B; what is saved whole and DoRA's
            magnitudes are averaged.
        schedule: λ(i): ``inverse_sqrt`` is 1/√i as in the paper, which favours new tasks (after 32 merges the
            first one weighs 1.4e-5); ``inverse`` is 1/i, which weighs all tasks alike; ``inverse_log`` is
            1/ln(i + 1), at most 1; ``constant`` is the field of that name. Or any function of i with values in
            (0, 1].
        constant: λ for the schedule ``constant``.
        density: share of the entries that ``ties`` and ``dare`` keep, in (0, 1].
        seed: of what ``dare`` drops. One seed, one result: torch's own generators are not touched.
        max_norm_growth: the norm of a tensor may grow by this factor in one merge. Ten, an order of magnitude, is
            our choice: starting from a trained accumulator, no healthy task does that.

    Raises InvalidSettingError.
    """

    mode: Mode = "slao"
    schedule: Schedule | Callable[[int], float] = "inverse_sqrt"
    constant: float = 1.0
    density: float = 0.5
    seed: int = 0
    max_norm_growth: float = 10.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise _invalid("mode", self.mode, f"one of {', '.join(MODES)}")
        if not callable(self.schedule) and self.schedule not in SCHEDULES:
            raise _invalid("schedule", self.schedule, f"one of {', '.join(SCHEDULES)}")
        for setting in ("constant", "density"):
            if not 0 < getattr(self, setting) <= 1:
                raise _invalid(setting, getattr(self, setting), "a number above 0 and at most 1")
        if not self.max_norm_growth > 1:
            raise _invalid("max_norm_growth", self.max_norm_growth, "a number above 1")

    def weight(self, index: int) -> float:
        """λ(index), in (0, 1]. Raises InvalidSettingError, also when a schedule of the user's leaves that range."""
        if index < 2:
            raise _invalid("index", index, "at least 2: the first adapter is the start")
        if callable(self.schedule):
            weight = float(self.schedule(index))
            if not 0 < weight <= 1:
                raise _invalid("schedule", f"{weight} for {index}", "a function with values above 0 and at most 1")
            return weight
        return {
            "inverse_sqrt": 1 / math.sqrt(index),
            "inverse": 1 / index,
            "inverse_log": min(1.0, 1 / math.log(index + 1)),
            "constant": float(self.constant),
        }[self.schedule]

    @property
    def schedule_name(self) -> str:
        """How a record calls the schedule."""
        if callable(self.schedule):
            return getattr(self.schedule, "__name__", type(self.schedule).__name__)
        return f"constant {self.constant:g}" if self.schedule == "constant" else self.schedule


def _invalid(setting: str, value: object, expected: str) -> InvalidSettingError:
    suggestion = "Correct this one value; docs/slao.md and `warden slao merge --help` explain it."
    return InvalidSettingError(setting=setting, value=value, expected=expected, suggestion=suggestion)
