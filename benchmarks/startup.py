"""How long a person waits for help: cold starts of `warden`, as ratios to an empty Python and to `import torch`.

Each command is started alternately with the two references, so that a busy machine slows all of them alike. The
issue asks for less than 0.4 s for help and explanations; what was imported is told beside it.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any

from benchkit import environment, markdown_table, parser, write_json

COMMANDS: dict[str, list[str]] = {
    "python -c pass": ["-c", "pass"],
    "python -c 'import torch'": ["-c", "import torch"],
    "python -c 'import trainwarden'": ["-c", "import trainwarden"],
    "warden --help": ["-m", "trainwarden.cli.main", "--help"],
    "warden explain RUNTIME_GPU_OOM": ["-m", "trainwarden.cli.main", "explain", "RUNTIME_GPU_OOM"],
    "warden train --help": ["-m", "trainwarden.cli.main", "train", "--help"],
    "warden runs ls": ["-m", "trainwarden.cli.main", "runs", "ls"],
    "warden probe": ["-m", "trainwarden.cli.main", "probe"],
}
REFERENCE = "python -c pass"


def seconds(arguments: list[str]) -> float:
    """Wall time of one cold start."""
    began_s = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=False, capture_output=True)
    return time.perf_counter() - began_s


def measure(rounds: int) -> dict[str, list[float]]:
    """Times of all commands in turn, after one unmeasured round that warms the file cache."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for index in range(rounds + 1):
        for name, arguments in COMMANDS.items():
            took_s = seconds(arguments)
            if index:
                times[name].append(took_s)
    return times


def summarise(times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Median and range of each command, and its ratio to an empty Python in the same round."""
    references = times[REFERENCE]
    return [
        {
            "command": name,
            "median_s": round(statistics.median(own), 3),
            "min_s": round(min(own), 3),
            "max_s": round(max(own), 3),
            "ratio": round(statistics.median(a / b for a, b in zip(own, references, strict=True)), 2),
        }
        for name, own in times.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The summary as a table."""
    cells = [
        [f"`{r['command']}`", f"{r['median_s']:.3f} s", f"{r['min_s']:.3f} … {r['max_s']:.3f} s", f"{r['ratio']:.1f}×"]
        for r in rows
    ]
    return markdown_table(("command", "median", "range", "to an empty Python"), cells)


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--rounds", type=int, default=15, help="measured starts of each command (default 15)")
    chosen = options.parse_args()
    rows = summarise(measure(chosen.rounds))
    print(table(rows))
    command = f"python benchmarks/startup.py --seed {chosen.seed} --rounds {chosen.rounds}"
    packages = ["trainwarden", "torch", "transformers", "typer", "pydantic", "rich"]
    write_json(chosen.output / "startup.json", {"environment": environment(command, "cpu", packages), "rows": rows})
    (chosen.output / "startup.md").write_text(table(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
