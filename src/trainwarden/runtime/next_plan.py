"""What a rank that had to end leaves for the next start: the micro-batch size that will fit.

Any rank may leave it, so each writes a file of its own into the run directory, which ranks share as they share the
checkpoints. The next start takes the smallest; the first checkpoint after that holds it, and the files go.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

_PATTERN = "next_plan.rank*.json"


def leave(run_dir: Path, rank: int, micro_batch_size: int) -> None:
    """Writes the size down, whole or not at all. A disk that refuses is let be: the restart then learns it again."""
    path = run_dir / _PATTERN.replace("*", str(rank))
    temporary = path.with_suffix(".tmp")
    with suppress(OSError):
        temporary.write_text(json.dumps({"micro_batch_size": micro_batch_size}), encoding="utf-8")
        os.replace(temporary, path)  # noqa: PTH105 - one call an operation


def found(run_dir: Path) -> int | None:
    """The smallest size left behind; files that cannot be read say nothing."""
    sizes = []
    for path in run_dir.glob(_PATTERN):
        with suppress(OSError, ValueError, KeyError, TypeError):
            sizes.append(int(json.loads(path.read_text(encoding="utf-8"))["micro_batch_size"]))
    return min((size for size in sizes if size >= 1), default=None)


def clear(run_dir: Path) -> None:
    """Removes what `leave` wrote."""
    for path in run_dir.glob(_PATTERN):
        with suppress(OSError):
            path.unlink()
