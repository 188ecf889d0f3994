"""Several ranks have one outcome, and what no rank knows stays unknown."""

from __future__ import annotations

import json
import math
from dataclasses import replace

from trainwarden.train.result import TrainResult, result_of_ranks

RESULT = TrainResult(
    run_id="r",
    run_dir="runs/r",
    steps_completed=8,
    steps_skipped=1,
    shrinks=0,
    data_skipped=0,
    tokens=100,
    wall_s=2.0,
    first_loss=5.0,
    final_loss=math.nan,
    best_loss=4.0,
    mean_loss=4.5,
    eval_loss=None,
    peak_memory_bytes=None,
    max_temperature_c=None,
    checkpoint_path=None,
    model_path="runs/r/model",
    world_size=3,
    global_batch_size=24,
)


def test_the_outcome_of_ranks_is_rank_0s_with_the_most_that_any_has_met() -> None:
    ranks = [
        RESULT,
        replace(RESULT, shrinks=2, wall_s=1.0, peak_memory_bytes=7, max_temperature_c=60.0),
        replace(RESULT, wall_s=3.0, peak_memory_bytes=9, data_skipped=1),
    ]
    merged = result_of_ranks(ranks)
    expected = {"shrinks": 2, "data_skipped": 1, "wall_s": 3.0, "peak_memory_bytes": 9, "max_temperature_c": 60.0}
    assert merged.to_dict() == {**RESULT.to_dict(), **expected}


def test_what_no_rank_knows_is_unknown() -> None:
    assert result_of_ranks([RESULT, RESULT]).peak_memory_bytes is None


def test_a_loss_that_is_no_number_stays_visible_in_json() -> None:
    assert json.loads(json.dumps(RESULT.to_dict()))["final_loss"] == "nan"
