"""The benchmark of the finite check measures what it says, on a few values."""

from __future__ import annotations

import math
from typing import Any

import finite_check
import pytest
import torch


def test_the_gradients_are_those_of_a_transformer_of_about_the_size_asked_for() -> None:
    tensors = finite_check.gradients(200_000, torch.bfloat16, "cpu")
    assert 150_000 < sum(tensor.numel() for tensor in tensors) < 250_000
    assert len(tensors) == 124
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_contestants_judge_alike(dtype: torch.dtype) -> None:
    tensors = finite_check.gradients(20_000, dtype, "cpu")
    assert all(check() for check in finite_check.contestants(tensors).values())
    tensors[57].view(-1)[3] = math.inf
    assert not any(check() for check in finite_check.contestants(tensors).values())


def test_every_round_times_every_action_after_one_that_is_not_counted() -> None:
    called: list[str] = []
    times = finite_check.in_turns({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 3, "cpu")
    assert called == ["a", "b"] * 4
    assert [len(took_s) for took_s in times.values()] == [3, 3]


def test_a_small_run_fills_both_tables() -> None:
    result: dict[str, Any] = {"checks": finite_check.measure_checks(20_000, 2, "cpu")}
    result["steps"] = finite_check.measure_steps(2, "cpu", width=16, layers=1, rows=2, length=9)
    assert len(result["checks"]) == 6
    assert [row["way"] for row in result["steps"]][:2] == ["nothing", finite_check.OURS]
    assert finite_check.table(result).count("\n|") == 7 + 6, "both tables, but for the first line"
    assert all(row["ms"] >= 0 for row in result["checks"])


@pytest.mark.parametrize(
    ("of_flat", "speedup", "added", "holds"),
    [(0.8, 12.0, 0.002, True), (0.6, 12.0, 0.002, False), (0.8, 9.0, 0.002, False), (0.8, 12.0, 0.02, False)],
)
def test_the_requirements_are_those_of_the_issue(of_flat: float, speedup: float, added: float, holds: bool) -> None:
    check = {"check": finite_check.OURS, "dtype": "float32", "of_flat": of_flat, "speedup": speedup}
    step = {"way": finite_check.OURS, "added": added}
    assert finite_check.verdict({"checks": [check], "steps": [step]}) is holds
