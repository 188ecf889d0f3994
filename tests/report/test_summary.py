"""The table at the end says how the run went, and never more than is known."""

from __future__ import annotations

from typing import Any

from trainwarden.report.summary import summary_text

RESULT: dict[str, Any] = {
    "status": "finished",
    "run_id": "20261120-215800-3f9a",
    "run_dir": "runs/demo",
    "steps_completed": 200,
    "steps_skipped": 2,
    "shrinks": 1,
    "data_skipped": 3,
    "tokens": 123456,
    "wall_s": 95.2,
    "first_loss": 5.5,
    "final_loss": 2.25,
    "best_loss": 2.2,
    "mean_loss": 3.0,
    "eval_loss": None,
    "peak_memory_bytes": 3 * 2**29,
    "max_temperature_c": 61.0,
    "checkpoint_path": "runs/demo/checkpoints/step-00000200",
    "model_path": "runs/demo/model",
    "rollbacks": 0,
    "world_size": 1,
    "global_batch_size": 8,
    "exit_code": 0,
}


def as_rows(shown: str) -> dict[str, str]:
    return dict(line.strip().split("  ", 1) for line in shown.splitlines())


def test_every_figure_has_its_line() -> None:
    rows = {label: value.strip() for label, value in as_rows(summary_text(RESULT)).items()}
    assert rows == {
        "status": "finished",
        "run": "20261120-215800-3f9a",
        "wall time": "1 min 35 s",
        "steps": "200",
        "rows a step": "8",
        "skipped": "2",
        "shrinks": "1",
        "left out": "3",
        "tokens": "123,456",
        "first loss": "5.5000",
        "final loss": "2.2500",
        "best loss": "2.2000",
        "mean loss": "3.0000 (without 2 skipped steps)",
        "peak memory": "1.50 GiB",
        "max temperature": "61 °C",
        "checkpoint": "runs/demo/checkpoints/step-00000200",
        "model": "runs/demo/model",
        "exit code": "0",
    }


def test_a_mean_of_all_steps_says_nothing_and_one_without_some_how_many() -> None:
    shown = [
        as_rows(summary_text({**RESULT, "steps_skipped": skipped}))["mean loss"].strip() for skipped in (0, 1, None)
    ]
    assert shown == ["3.0000", "3.0000 (without 1 skipped step)", "3.0000"]


def test_what_is_unknown_says_so() -> None:
    shown = summary_text({**RESULT, "peak_memory_bytes": None, "max_temperature_c": None, "checkpoint_path": None})
    assert shown.count("unknown") == 3


def test_a_run_whose_losses_were_nan_says_nan() -> None:
    shown = summary_text({**RESULT, "final_loss": "nan", "best_loss": "nan", "mean_loss": "nan"})
    assert shown.count("NaN") == 3
    assert " 0.0" not in shown


def test_ranks_and_returns_are_shown_where_there_are_any() -> None:
    shown = summary_text({**RESULT, "world_size": 2, "rollbacks": 1})
    assert as_rows(shown)["rows a step"].strip() == "8 on 2 ranks"
    assert as_rows(shown)["went back"].strip() == "1"
    assert "went back" not in summary_text(RESULT)


def test_an_evaluation_is_shown_when_there_was_one() -> None:
    assert "evaluation loss  2.5000" in summary_text({**RESULT, "eval_loss": 2.5})


def test_a_result_that_holds_nothing_is_a_table_of_unknowns() -> None:
    shown = summary_text({})
    assert "0" not in shown
    assert shown.count("unknown") == len(shown.splitlines())


def test_the_result_of_the_trainer_has_every_key_that_is_read_here() -> None:
    import dataclasses

    from trainwarden.train.result import TrainResult

    assert {field.name for field in dataclasses.fields(TrainResult)} == set(RESULT)
