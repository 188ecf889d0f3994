"""What a rank that had to end leaves for the next start: what did not fit, and the micro-batch size that will.

Any rank may leave it, so each writes a file of its own into the run directory, which ranks share as they share the
checkpoints. The next start learns from all of them; the first checkpoint after that holds what it knows, and the files
go.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainwarden.guards.memory_plan import Size
from trainwarden.runtime.plan import MicroBatchPlan

_PATTERN = "next_plan.rank*.json"

Lesson = tuple[Size, Size]


@dataclass(frozen=True)
class Left:
    """What all ranks have left: the fewest ``rows``, and the ``lessons`` of those that know at what length."""

    rows: int
    lessons: tuple[Lesson, ...] = ()

    def teach(self, plan: MicroBatchPlan) -> bool:
        """Whether it was news to ``plan``. By rows alone only where no length is known: shorter rows fit more."""
        if self.lessons:
            before = plan.bounds
            plan.learn(self.lessons)
            return plan.bounds != before
        if plan.limit is not None and plan.limit <= self.rows:
            return False
        plan.limit = self.rows
        return True


def leave(run_dir: Path, rank: int, micro_batch_size: int, lesson: Lesson | None = None) -> None:
    """Writes it down, whole or not at all. A disk that refuses is let be: the restart then learns it again."""
    path = run_dir / _PATTERN.replace("*", str(rank))
    temporary = path.with_suffix(".tmp")
    said: dict[str, Any] = {"micro_batch_size": micro_batch_size}
    if lesson is not None:
        said["lesson"] = [list(size) for size in lesson]
    with suppress(OSError):
        temporary.write_text(json.dumps(said), encoding="utf-8")
        os.replace(temporary, path)  # noqa: PTH105 - one call an operation


def found(run_dir: Path) -> Left | None:
    """What was left behind; files that cannot be read say nothing."""
    rows: list[int] = []
    lessons: list[Lesson] = []
    for path in sorted(run_dir.glob(_PATTERN)):
        with suppress(OSError, ValueError, KeyError, TypeError):
            said = json.loads(path.read_text(encoding="utf-8"))
            size = int(said["micro_batch_size"])
            if size < 1:
                continue
            rows.append(size)
            if "lesson" in said:
                failed, fits = (Size(int(count), int(length)) for count, length in said["lesson"])
                lessons.append((failed, fits))
    return Left(min(rows), tuple(lessons)) if rows else None


def clear(run_dir: Path) -> None:
    """Removes what `leave` wrote."""
    for path in run_dir.glob(_PATTERN):
        with suppress(OSError):
            path.unlink()
