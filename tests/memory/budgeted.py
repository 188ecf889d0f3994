"""A child that trains for real under an exact allocation budget: cases as JSON on stdin, outcomes as JSON on stdout.

Run with ``LD_PRELOAD`` set to the library made of ``budget.c``. Each case: a model configuration, a plan, and the bytes
of its budget (0: none), or ``less_bytes``: how many fewer than the peak of the case before. Each outcome: whether two
steps ran through, and the most that was allocated.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from typing import Any

import torch

from trainwarden.guards.oom import is_out_of_memory
from trainwarden.memory.plan import TrainingPlan
from trainwarden.memory.trace_loop import run_steps
from trainwarden.train.forecast import builder, loop_for


def main() -> None:
    torch.set_num_threads(1)
    library = ctypes.CDLL(None)
    library.budget_begin.argtypes = [ctypes.c_size_t]
    library.budget_peak.restype = ctypes.c_size_t
    cases = json.load(sys.stdin)
    # Once without a budget: libraries are imported, and kernels keep what they keep for the life of the process.
    train(library, cases[0]["config"], TrainingPlan(**cases[0]["plan"]), 0)
    outcomes: list[dict[str, Any]] = []
    for case in cases:
        budget_bytes = case["budget_bytes"]
        if "less_bytes" in case:
            budget_bytes = outcomes[-1]["peak_bytes"] - case["less_bytes"]
        fits = train(library, case["config"], TrainingPlan(**case["plan"]), budget_bytes)
        outcomes.append({"fits": fits, "peak_bytes": library.budget_peak()})
    print(json.dumps(outcomes))


def train(library: Any, config: dict[str, Any], plan: TrainingPlan, budget_bytes: int) -> bool:
    """Two optimizer steps; False when memory ran out in any of them."""
    gc.collect()
    library.budget_begin(budget_bytes)
    try:
        model = builder(config, plan)()
        shape = (plan.micro_batch_size, plan.sequence_length)
        ids = torch.randint(0, config["vocab_size"], shape)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        run_steps(model, batch, loop_for(plan), autocast=None)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


if __name__ == "__main__":
    main()
