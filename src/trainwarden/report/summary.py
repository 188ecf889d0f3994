"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainwarden.report import text


def summary_text(result: Mapping[str, Any]) -> str:
    """The outcome of a run as a table of two columns.

    Args:
        result: what ``TrainResult.to_dict()`` gives. What it does not hold is unknown; ``eval_loss`` and
            ``model_path`` are left out where they were not asked for, as are returns where there were none.
    """
    rows = [
        ("status", text.word(result.get("status"))),
        ("run", text.word(result.get("run_id"))),
        ("wall time", text.duration(result.get("wall_s"))),
        ("steps", text.count(result.get("steps_completed"))),
        ("skipped", text.count(result.get("steps_skipped"))),
        ("shrinks", text.count(result.get("shrinks"))),
        ("left out", text.count(result.get("data_skipped"))),
        ("tokens", text.count(result.get("tokens"))),
        ("first loss", text.number(result.get("first_loss"))),
        ("final loss", text.number(result.get("final_loss"))),
        ("best loss", text.number(result.get("best_loss"))),
        ("mean loss", text.number(result.get("mean_loss")) + _without(result.get("steps_skipped"))),
    ]
    if result.get("global_batch_size") is not None:
        ranks = result.get("world_size") or 1
        rows.insert(4, ("rows a step", text.count(result["global_batch_size"]) + (f" on {ranks} ranks" * (ranks > 1))))
    if result.get("rollbacks"):
        rows.insert(4, ("went back", text.count(result["rollbacks"])))
    if result.get("eval_loss") is not None:
        rows.append(("evaluation loss", text.number(result["eval_loss"])))
    rows += [
        ("peak memory", text.size(result.get("peak_memory_bytes"))),
        ("max temperature", text.temperature(result.get("max_temperature_c"))),
        ("checkpoint", text.word(result.get("checkpoint_path"))),
    ]
    if result.get("model_path") is not None:
        rows.append(("model", text.word(result["model_path"])))
    rows.append(("exit code", text.word(result.get("exit_code"))))
    return text.pairs(rows)


def _without(skipped: int | None) -> str:
    """What a mean leaves out, where it leaves something out."""
    if not skipped:
        return ""
    return f" (without {text.count(skipped)} skipped step{'s' * (skipped > 1)})"
