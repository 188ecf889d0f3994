"""Predicted memory beside real memory: traces on fake tensors, the closed form, and accelerate's estimate.

Three parts. *Real cases* train small models for two steps on the CPU, in a process whose allocator is counted to the
byte (memory_prediction.c, preloaded), and compare the peaks. *Published figures* are GPU peaks that others measured,
with what is known to differ. *The grid* ({0.5B, 1.5B, 7B} × {full, LoRA, QLoRA} × {512, 4096} tokens) runs with
``--device cuda`` where there is a card; its QLoRA cells need bitsandbytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import benchkit
import torch
from memory_cases.cases import CASES, DTYPES, OUTSIDE, Case, config_of, drawn_cases, on_meta, traced
from memory_cases.estimates import accelerate_estimate, closed_form, plan_of
from memory_cases.grid import grid_rows, run_cell
from memory_cases.published import published_rows
from memory_cases.real import measure, worker

from trainwarden.memory.trace import CannotTraceError

MIB, GIB = 2**20, 2**30
MEAN_LIMIT, WORST_LIMIT = 0.001, 0.01


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case: all peaks in bytes, ``None`` where a method has no answer."""

    case: str
    real: int
    traced: int | None
    closed_form: int | None
    accelerate: int | None
    reason: str = ""

    @property
    def error(self) -> float | None:
        """Relative, of the trace."""
        return None if self.traced is None else self.traced / self.real - 1


def compare(cases: Sequence[Case], seed: int) -> list[Row]:
    """All cases, run and predicted."""
    torch.manual_seed(seed)
    rows = []
    for case, real in zip(cases, measure(cases, seed), strict=True):
        reason, peak = "", None
        try:
            peak = traced(case).peak_bytes
        except CannotTraceError as error:
            reason = error.reason
        plan = plan_of(case)
        with torch.device("meta"):
            model = on_meta(replace(case, mode="full"))
        rows.append(
            Row(
                case=case.name,
                real=real,
                traced=peak,
                closed_form=None if plan is None else closed_form(config_of(case).to_dict(), plan),
                accelerate=accelerate_estimate(model, DTYPES[case.dtype]),
                reason=reason,
            )
        )
    return rows


def summary(rows: Iterable[Row]) -> dict[str, float]:
    """Mean and worst absolute relative error of the traces."""
    errors = [abs(row.error) for row in rows if row.error is not None] or [0.0]
    return {"cases": len(errors), "mean_error": statistics.fmean(errors), "worst_error": max(errors)}


# -- tables, plot and command line ------------------------------------------------------------------------------------


def case_table(rows: Sequence[Row]) -> str:
    """Real cases: peaks in MiB, and the trace's error."""
    cells = [
        [r.case, _mib(r.real), _mib(r.traced), _percent(r.error), _mib(r.closed_form), _mib(r.accelerate)] for r in rows
    ]
    columns = ("case", "real, MiB", "traced, MiB", "error", "closed form, MiB", "accelerate, MiB")
    return benchkit.markdown_table(columns, cells)


def published_table(rows: Sequence[dict[str, Any]]) -> str:
    """Published figures: GiB throughout."""
    names = ("published_gib", "traced_gib", "closed_form_gib", "accelerate_gib")
    cells = [
        [r["source"], r["what"], *("–" if r[name] is None else f"{r[name]:.1f}" for name in names), r["differs"]]
        for r in rows
    ]
    columns = ("source", "what", "published, GiB", "traced", "closed form", "accelerate", "what differs")
    return benchkit.markdown_table(columns, cells)


def grid_table(rows: Sequence[dict[str, Any]]) -> str:
    """The grid: GiB, and the trace's error against ``max_memory_allocated``."""
    names = ("traced", "allocated", "reserved", "outside")
    cells = [[r["what"], *(_gib(r.get(n)) for n in names), _percent(r.get("error")), r.get("reason", "")] for r in rows]
    columns = ("cell", "traced, GiB", "allocated", "reserved", "outside the allocator", "error", "not run because")
    return benchkit.markdown_table(columns, cells)


def _mib(value: int | None) -> str:
    return "–" if value is None else f"{value / MIB:.1f}"


def _gib(value: int | None) -> str:
    return "–" if value is None else f"{value / GIB:.2f}"


def _percent(error: float | None) -> str:
    return "–" if error is None else f"{100 * error:+.3f} %"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Ratio of each method's prediction to the real peak, case by case."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(11, 4.8), layout="constrained")
    methods = (("accelerate", "#7570b3", "x"), ("closed_form", "#d95f02", "s"), ("traced", "#0b7a4b", "o"))
    for name, colour, marker in methods:
        points = [(place, getattr(row, name) / row.real) for place, row in enumerate(rows) if getattr(row, name)]
        axis.scatter(*zip(*points, strict=True), color=colour, marker=marker, s=22, label=name.replace("_", " "))
    axis.axhline(1, color="0.3", linewidth=0.8)
    axis.set(xlabel="case (fixed ones first, then drawn ones)", ylabel="predicted / real peak", yscale="log")
    axis.set_yticks([0.1, 0.2, 0.5, 1, 2], labels=["0.1", "0.2", "0.5", "1", "2"])
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = benchkit.parser(__doc__ or "")
    parser.add_argument("--drawn", type=int, default=50, help="random cases beside the fixed ones (default 50)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: run the grid on the GPU as well"
    )
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--cell", type=int, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison; exit status 1 when the traces miss their limits."""
    chosen = options(arguments)
    if chosen.measure:
        return worker(chosen.seed)
    if chosen.cell is not None:
        print(json.dumps(run_cell(chosen.cell)))
        return 0
    warnings.simplefilter("ignore")
    fixed, drawn = compare(CASES, chosen.seed), compare(drawn_cases(chosen.drawn, chosen.seed), chosen.seed)
    outside = compare(OUTSIDE, chosen.seed)
    published = published_rows()
    grid = grid_rows() if chosen.device == "cuda" else []
    found = {"fixed": summary(fixed)} | ({"drawn": summary(drawn)} if drawn else {})
    kept = all(s["mean_error"] <= MEAN_LIMIT and s["worst_error"] <= WORST_LIMIT for s in found.values())
    kept = kept and all(row.traced is not None for row in [*fixed, *drawn])
    _report(chosen, fixed, drawn, outside, published, grid, found)
    print(f"\nThe traces keep their limits: {'yes' if kept else 'NO'}")
    return 0 if kept else 1


def _report(
    chosen: argparse.Namespace,
    fixed: list[Row],
    drawn: list[Row],
    outside: list[Row],
    published: list[dict[str, Any]],
    grid: list[dict[str, Any]],
    found: dict[str, dict[str, float]],
) -> None:
    lines = [
        f"{name}: {s['cases']:.0f} cases, mean error {s['mean_error']:.4%}, worst {s['worst_error']:.3%}"
        for name, s in found.items()
    ]
    tables = [case_table(fixed), case_table(outside), "\n".join(lines), published_table(published)]
    if grid:
        tables.append(grid_table(grid))
    text = "\n\n".join(tables)
    print(text)
    command = (
        f"python benchmarks/memory_prediction.py --seed {chosen.seed} --drawn {chosen.drawn} --device {chosen.device}"
    )
    packages = ["trainwarden", "torch", "transformers", "peft", "accelerate", "bitsandbytes"]
    rows = {"fixed": fixed, "drawn": drawn, "outside": outside}
    result = {
        "environment": benchkit.environment(command, chosen.device, packages),
        "summary": found,
        "cases": {name: [asdict(row) | {"error": row.error} for row in part] for name, part in rows.items()},
        "published": published,
        "grid": grid,
    }
    benchkit.write_json(chosen.output / "memory_prediction.json", result)
    (chosen.output / "memory_prediction.md").write_text(text + "\n", encoding="utf-8")
    if benchkit.installed("matplotlib"):
        plot([*fixed, *drawn], chosen.output / "memory_prediction.png")


if __name__ == "__main__":
    sys.exit(main())
