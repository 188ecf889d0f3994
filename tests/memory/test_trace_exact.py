"""Traces beside the real allocator: small models are trained for real, and every byte is counted."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.conftest import BENCHMARKS

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # transformers' and peft's own
    pytest.mark.skipif(shutil.which("cc") is None, reason="counting allocations needs a C compiler"),
]

SEED = 20
DRAWN_IN_CI = 2
NAMED = ("padded batch", "chunked loss, autocast, checkpointing", "QLoRA (bitsandbytes), 8-bit AdamW, chunked loss")


@pytest.fixture(scope="module")
def benchmark() -> Any:
    import memory_prediction

    return memory_prediction


def test_named_and_drawn_cases_are_right(benchmark: Any) -> None:
    named = [case for case in benchmark.CASES if case.name in NAMED]
    if find_spec("bitsandbytes") is None:
        named = [case for case in named if not case.bitsandbytes]
    cases = [*named, *benchmark.drawn_cases(DRAWN_IN_CI, SEED)]
    print(f"seed {SEED}: {cases}")
    rows = benchmark.compare(cases, SEED)
    found = benchmark.summary(rows)
    assert found["cases"] == len(cases)
    assert found["worst_error"] <= benchmark.WORST_LIMIT, rows
    # Products in bfloat16 take scratch space where the processor has instructions for them: too few cases for a mean.
    exact = [row for case, row in zip(cases, rows, strict=True) if case.dtype == "fp32"]
    assert exact
    assert benchmark.summary(exact)["mean_error"] <= benchmark.MEAN_LIMIT, exact


@pytest.mark.torture
@pytest.mark.parametrize("seed", [1, 2])
def test_fifty_drawn_cases(benchmark: Any, seed: int) -> None:
    cases = benchmark.drawn_cases(50, seed)
    print(f"seed {seed}")
    found = benchmark.summary(benchmark.compare(cases, seed))
    assert found["cases"] == 50
    assert found["mean_error"] <= benchmark.MEAN_LIMIT
    assert found["worst_error"] <= benchmark.WORST_LIMIT


def test_cases_are_drawn_the_same_for_the_same_seed(benchmark: Any) -> None:
    assert benchmark.drawn_cases(20, 7) == benchmark.drawn_cases(20, 7)
    assert benchmark.drawn_cases(20, 7) != benchmark.drawn_cases(20, 8)
    drawn = benchmark.drawn_cases(200, 0)
    assert {case.mode for case in drawn} == {"full", "lora", "qlora"}
    assert {case.dtype for case in drawn} == {"fp32", "bf16"}
    assert {case.optimizer for case in drawn} >= {"adamw", "adamw_foreach", "adamw_fused", "adamw_8bit", "sgd"}
    assert any(case.checkpointing for case in drawn)
    assert any(case.layers >= 9 for case in drawn)


def test_the_benchmark_has_at_least_twenty_cases(benchmark: Any) -> None:
    assert len(benchmark.CASES) >= 20
    assert len({case.name for case in benchmark.CASES}) == len(benchmark.CASES)


def test_the_tables_show_every_row(benchmark: Any) -> None:
    rows = [
        benchmark.Row(case="a", real=2**20, traced=2**20 + 1024, closed_form=None, accelerate=2**19),
        benchmark.Row(case="b", real=2**20, traced=None, closed_form=None, accelerate=None, reason="why"),
    ]
    lines = benchmark.case_table(rows).splitlines()
    assert len(lines) == 4
    assert "+0.098 %" in lines[2]
    assert benchmark.summary(rows) == {"cases": 1, "mean_error": 2**-10, "worst_error": 2**-10}
    assert "not run" in benchmark.grid_table([{"what": "7B", "traced": 2**30, "reason": "no card"}])


def test_a_plot_is_drawn(benchmark: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [benchmark.Row(case="a", real=100, traced=101, closed_form=90, accelerate=20)]
    benchmark.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_every_published_figure_of_the_notes_is_there(benchmark: Any) -> None:
    from memory_cases.published import PUBLISHED, SHAPES

    assert {entry.source for entry in PUBLISHED} == {"torchtune README", "LLaMA-Factory wiki", "Unsloth table"}
    assert {entry.published for entry in PUBLISHED} >= {18.9, 37.4, 16.2, 30.3, 7.4, 60.0, 17.6, 6, 32}
    assert {entry.model for entry in PUBLISHED} <= set(SHAPES)
    assert all(entry.differs for entry in PUBLISHED)


def test_the_grid_is_complete(benchmark: Any) -> None:
    from memory_cases.grid import GRID

    assert len(GRID) == 3 * 3 * 2 + 4
    assert sum(plan.loss_chunk_tokens is not None for _, plan in GRID) == 3
    assert sum(plan.optimizer == "adamw_8bit" for _, plan in GRID) == 1
    assert {plan.mode for _, plan in GRID} == {"full", "lora", "qlora"}
    assert {plan.sequence_length for _, plan in GRID} == {512, 4096}


def test_the_committed_results_keep_the_limits(benchmark: Any) -> None:
    facts = json.loads((BENCHMARKS / "results" / "memory_prediction.json").read_text(encoding="utf-8"))
    assert facts["summary"]["fixed"]["cases"] >= 20
    assert facts["summary"]["drawn"]["cases"] >= 50
    for found in facts["summary"].values():
        assert found["mean_error"] <= benchmark.MEAN_LIMIT
        assert found["worst_error"] <= benchmark.WORST_LIMIT
