"""The predicted largest micro-batch is the true one: under an exact budget it trains, and the next larger one fails.

The budget is a preloaded ``posix_memalign`` that refuses what would go past it; the training is real.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from trainwarden.memory.largest import Largest
from trainwarden.memory.overheads import NO_OVERHEADS, DeviceMemory
from trainwarden.memory.plan import TrainingPlan
from trainwarden.train.forecast import Forecast
from trainwarden.train.preflight import Judge
from trainwarden.train.subject import complete, subject_of

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("budget.c")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}
PLAN = TrainingPlan(mode="full", weights="float32", sequence_length=96, lora_rank=4)
CASES = [
    replace(PLAN, optimizer="sgd", grad_accum_steps=2),
    replace(PLAN, mode="lora", checkpointing=True),
]
"""Each value of each choice once; all combinations are torture."""
MORE_CASES = [
    replace(PLAN, mode=mode, optimizer=optimizer, checkpointing=checkpointing, grad_accum_steps=steps)
    for mode, optimizer, checkpointing, steps in itertools.product(
        ("full", "lora"), ("sgd", "adamw_fused", "adamw_foreach"), (False, True), (1, 2)
    )
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The allocator with a budget, compiled."""
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("a C compiler and Linux's LD_PRELOAD are needed for an exact allocation budget")
    made = tmp_path_factory.mktemp("budget") / "libbudget.so"
    command = [compiler, "-shared", "-fPIC", "-O2", "-o", str(made), str(SOURCE), "-ldl", "-lpthread"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return made


def case_of(plan: TrainingPlan, budget_bytes: int) -> dict[str, Any]:
    return {"config": LLAMA, "plan": asdict(plan), "budget_bytes": budget_bytes}


def train(library: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What became of the cases in a child under the budget."""
    environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.memory.budgeted"]
    done = subprocess.run(
        command, input=json.dumps(cases), capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    outcomes: list[dict[str, Any]] = json.loads(done.stdout)
    return outcomes


def predicted(plan: TrainingPlan, budget_bytes: int, forecast: Forecast) -> Largest:
    device = DeviceMemory(name="a budget", total_bytes=budget_bytes)
    return Judge(forecast, NO_OVERHEADS, device).rows(plan)


def check(library: Path, plans: list[TrainingPlan], seed: str) -> None:
    # The instrument itself: at its real peak a training runs through, and one byte less refuses it.
    free = case_of(replace(PLAN, micro_batch_size=2), 0)
    cases, expected = [free, {**free, "less_bytes": 0}, {**free, "less_bytes": 1}], [True, True, False]
    for plan in plans:
        forecast = Forecast(subject_of("tiny", complete("tiny", LLAMA), plan), device_type="cpu")
        least, most = (forecast.estimate(replace(plan, micro_batch_size=rows)).peak_bytes for rows in (2, 9))
        budget = random.Random(f"{seed} {plan}").randint(least, most)
        found = predicted(plan, budget, forecast)
        assert 1 <= found.value <= 12
        for rows in (found.value, found.value + 1):
            cases.append(case_of(replace(plan, micro_batch_size=rows), budget))
            expected.append(rows == found.value)
    outcomes = train(library, cases)
    wrong = [
        (case["plan"], case["budget_bytes"], outcome)
        for case, fits, outcome in zip(cases, expected, outcomes, strict=True)
        if outcome["fits"] is not fits
    ]
    assert not wrong, f"seed {seed!r}: {wrong}"


def test_the_largest_micro_batch_fits_and_the_next_one_really_fails(library: Path) -> None:
    check(library, CASES, seed="0")


@pytest.mark.torture
@pytest.mark.parametrize("seed", ["1", "2"])
def test_the_largest_micro_batch_is_the_true_one_in_every_combination(library: Path, seed: str) -> None:
    check(library, MORE_CASES, seed)
