"""``warden slao run``: what is printed, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.slao.campaigns import NAN, TWO, save_base, write_work
from trainwarden.cli.main import main

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_work(tmp_path, base)


def run(*overrides: str, more: tuple[str, ...] = ()) -> int:
    return main(["slao", "run", "campaign.yaml", *(word for one in overrides for word in ("-o", one)), *more])


def document(capsys: Captured) -> Any:
    return json.loads(capsys.readouterr().out)


def test_a_campaign_is_run_shown_listed_and_nothing_is_left_to_do(capsys: Captured) -> None:
    assert run(TWO) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].split() == ["TASK", "STATE", "WEIGHT", "SNAPSHOT", "LOSS", "a", "LOSS", "b", "RUN"]
    assert [line.split()[:4] for line in lines[1:3]] == [["a", "merged", "1.0000", "1"], ["b", "merged", "0.7071", "2"]]
    assert "campaign/merged holds 2 adapters merged into one" in lines[-1]
    assert "warden: task a (1 of 2) trains in" in captured.err
    assert "step 3/3" in captured.err
    assert set(load_file("campaign/merged/adapter_model.safetensors"))
    assert run(TWO) == 0
    again = capsys.readouterr()
    assert again.out == captured.out
    assert again.err == ""
    assert main(["runs", "ls", "--output-format", "json"]) == 0
    assert {Path(row["path"]).name for row in document(capsys)["runs"]} == {"a", "b"}
    assert main(["slao", "history", "campaign/merged"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[:4] == ["2", "slao", "2", "b"]


def test_the_result_is_one_json_document(capsys: Captured) -> None:
    assert run(TWO, more=("--output-format", "json")) == 0
    found = document(capsys)
    assert [(task["name"], task["state"]) for task in found["tasks"]] == [("a", "merged"), ("b", "merged")]
    assert set(found["tasks"][1]["losses"]) == {"a", "b"}


def test_partial_success_is_85_with_the_list(capsys: Captured) -> None:
    assert run(NAN, TWO, "on_failure=continue") == 85
    captured = capsys.readouterr()
    assert captured.out.splitlines()[2].split()[:2] == ["b", "RUNTIME_NAN_LOSS"]
    assert "1 of 2 tasks failed (50 % succeeded): b (RUNTIME_NAN_LOSS)" in captured.err
    assert "PARTIAL_BATCH_OPERATION (exit status 85)" in captured.err
    assert f"warden slao run campaign.yaml -o {NAN} -o {TWO} -o on_failure=continue" in captured.err
    assert run(NAN, TWO, "on_failure=continue", more=("--output-format", "json")) == 85
    found = document(capsys)
    assert (found["code"], found["details"]["done"]) == ("PARTIAL_BATCH_OPERATION", ["a"])
    assert [(one["task"], one["code"]) for one in found["details"]["failed"]] == [("b", "RUNTIME_NAN_LOSS")]


def test_a_failure_ends_the_campaign_with_its_own_status(capsys: Captured) -> None:
    assert run(NAN) == 80
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "RUNTIME_NAN_LOSS (exit status 80)" in captured.err
    assert "resume with" in captured.err


def test_a_merge_that_the_gate_holds_back_is_83(capsys: Captured) -> None:
    assert run(TWO, "gate.max_forgetting_nats=0.0") == 83
    captured = capsys.readouterr()
    assert "merging b would raise the held-out loss of a by " in captured.err
    assert "RUNTIME_EVAL_GATE_REGRESSED" in captured.err


def test_a_dry_run_shows_every_setting_and_trains_nothing(capsys: Captured) -> None:
    assert run("merge.schedule=inverse", more=("--dry-run",)) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines["merge.schedule"] == ["inverse", "flag"]
    assert lines["tasks.c.data.train"][1].startswith("campaign.yaml:")
    assert not Path("campaign").exists()
    assert run(more=("--dry-run", "--output-format", "json")) == 0
    assert document(capsys)["config"]["merge.mode"] == "slao"


def test_a_wrong_key_is_78_with_the_right_one(capsys: Captured) -> None:
    assert run("merge.shedule=inverse") == 78
    assert "did you mean merge.schedule?" in capsys.readouterr().err


def test_the_configuration_that_is_shipped_is_a_campaign(capsys: Captured) -> None:
    shipped = Path(__file__).parents[2] / "configs" / "slao.yaml"
    assert main(["slao", "run", str(shipped), "--dry-run"]) == 0
    assert "merge.mode" in capsys.readouterr().out
