"""The list of runs and the page of one."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from trainwarden.report.history import History
from trainwarden.report.runs import page_dict, run_page, runs_table
from trainwarden.runs import RunManifest, RunRecord

RECORD = RunRecord(
    run_id="20261120-215800-3f9a",
    path="/home/me/runs/demo",
    command=("python", "train.py", "--name", "two words"),
    status="stopped",
    started_at="2026-11-20T21:58:00.123+00:00",
    ended_at="2026-11-20T22:00:00.456+00:00",
    pid=4711,
    steps_completed=40,
    steps_skipped=2,
    shrinks=1,
    data_skipped=3,
    final_loss=2.5,
    exit_code=75,
    code="RUNTIME_TRAINING_ABORTED",
    checkpoint_path="/home/me/runs/demo/checkpoints/step-00000040",
    model="LlamaForCausalLM",
)
LOST = RunRecord(
    run_id="20261121-080000-77aa",
    path="/home/me/runs/other",
    command=("python", "train.py"),
    status="lost",
    started_at="2026-11-21T08:00:00.000+00:00",
)
HISTORY = History.read(
    [
        {"event": "metrics_logged", "step": 10, "loss": 5.0},
        {"event": "step_skipped", "step": 20},
        {"event": "metrics_logged", "step": 20, "loss": "nan"},
        {"event": "metrics_logged", "step": 30, "loss": 2.5},
        {"event": "checkpoint_saved", "step": 30, "path": "c/step-00000030"},
    ]
)


def test_a_run_is_a_line() -> None:
    header, line, _ = runs_table([RECORD, LOST]).splitlines()
    assert header.split() == [
        "RUN",
        "STATUS",
        "STARTED",
        "(UTC)",
        "STEPS",
        "SKIPPED",
        "SHRINKS",
        "LEFT-OUT",
        "LOSS",
        "EXIT",
        "DIRECTORY",
    ]
    assert line.split() == [
        "20261120-215800-3f9a",
        "stopped",
        "2026-11-20",
        "21:58:00",
        "40",
        "2",
        "1",
        "3",
        "2.5000",
        "75",
        "/home/me/runs/demo",
    ]


def test_what_is_unknown_is_a_dash_and_never_a_zero() -> None:
    line = runs_table([LOST]).splitlines()[1]
    assert line.split()[4:10] == ["-"] * 6


def test_a_nan_loss_reads_nan() -> None:
    assert " NaN " in runs_table([dataclasses.replace(RECORD, final_loss=math.nan)])


def test_the_page_tells_how_it_ended_and_how_to_go_on() -> None:
    page = run_page(RECORD, None, HISTORY, path=RECORD.path, resume_command="warden resume runs/demo")
    for said in (
        "status       stopped",
        "steps        40",
        "left out     3",
        "last loss    2.5000",
        "exit code    75",
        "RUNTIME_TRAINING_ABORTED (warden explain RUNTIME_TRAINING_ABORTED)",
        "python train.py --name 'two words'",
        "resume with  warden resume runs/demo",
        "started      2026-11-20 21:58:00 UTC",
    ):
        assert said in page


def test_the_curve_shows_the_nan_and_the_skip_below_it() -> None:
    page = run_page(RECORD, None, HISTORY, path="p", resume_command=None)
    curve = page.split("\n\n")[1].splitlines()
    assert curve[0].strip() == "loss  step 10: 5.0000   lowest 2.5000   step 30: 2.5000"
    assert curve[1] == "  █×▁"
    assert curve[2] == "   s"
    assert curve[3].strip() == "s step skipped: 1"
    assert "#x_" in run_page(RECORD, None, HISTORY, path="p", resume_command=None, unicode=False)


def test_a_lost_run_tells_what_its_log_still_knows() -> None:
    page = run_page(LOST, None, HISTORY, path=LOST.path, resume_command="python train.py")
    assert "status       lost" in page
    assert "steps        unknown (30 at the last event)" in page
    assert "checkpoint   c/step-00000030" in page
    assert "last loss    unknown" in page


def test_a_directory_that_the_ledger_does_not_know_has_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = RunManifest.new(["python", "train.py"], None)
    page = run_page(None, manifest, History(), path=str(tmp_path), resume_command=None)
    assert manifest.run_id in page
    assert "unknown (not in the ledger)" in page
    assert "loss  step" not in page


def test_the_page_as_json_is_strict_and_keeps_the_nan() -> None:
    page = page_dict(RECORD, None, HISTORY, path=RECORD.path, resume_command=None)
    assert json.loads(json.dumps(page, allow_nan=False)) == page
    assert page["losses"] == [[10, 5.0], [20, "nan"], [30, 2.5]]
    assert page["interventions"] == [[20, "step_skipped"]]
    assert page["run"]["status"] == "stopped"


def test_a_run_of_which_only_nan_is_known_has_no_lowest_number() -> None:
    history = History.read([{"event": "metrics_logged", "step": 1, "loss": "nan"}])
    assert "lowest NaN" in run_page(RECORD, None, history, path="p", resume_command=None)


def test_a_run_that_was_started_again_says_so() -> None:
    record = dataclasses.replace(RECORD, starts=3)
    assert "UTC, 3 times in all" in run_page(record, None, History(), path="p", resume_command=None)
