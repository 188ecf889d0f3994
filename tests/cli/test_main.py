"""The command line answers at once, says what is wrong in one block, and ends with the right number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwarden.cli import commands
from trainwarden.cli.main import main
from trainwarden.cli.output import Output
from trainwarden.errors import TrainingAbortedError, registry
from trainwarden.runs import Ledger, RunDirectory

Captured = pytest.CaptureFixture[str]

CONFIG = """\
output_dir: runs/demo
model: {config: {model_type: llama, hidden_size: 32}}
data: {train: python-docstrings}
trainer: {max_steps: 20, learning_rate: 1e-4}
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.yaml").write_text(CONFIG)
    return tmp_path


def document(capsys: Captured) -> Any:
    """The one JSON document on stdout."""
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["explain", "--all"], ["explain", "RUNTIME_GPU_OOM"], ["runs", "ls"], ["--version"]]
)
def test_no_heavy_package_is_imported_for_a_light_answer(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom trainwarden.cli.main import main\nmain(sys.argv[1:])\n"
        "print([n for n in ('torch', 'rich', 'transformers', 'yaml') if n in sys.modules], file=sys.stderr)"
    )
    answer = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert answer.stderr.splitlines()[-1] == "[]"


def test_the_help_names_every_command(capsys: Captured) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("train", "resume", "runs", "explain", "probe", "--exit-profile", "--output-format", "--debug"):
        assert name in shown


def test_without_a_command_the_help_is_shown(capsys: Captured) -> None:
    assert main([]) == 0
    assert "Usage: warden" in capsys.readouterr().out


def test_the_version_is_printed(capsys: Captured) -> None:
    from trainwarden import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"trainwarden {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bogus"], "no such command 'bogus'"),
        (["train"], "warden train: missing argument 'CONFIG'"),
        (["train", "a", "b"], "unexpected extra argument"),
        (["train", "a.yaml", "--bogus"], "no such option: --bogus"),
        (["train", "a.yaml", "--resume", "perhaps"], "--resume"),
        (["train", "a.yaml", "-o"], "-o"),
        (["runs"], "warden runs: missing command"),
        (["runs", "ls", "-n", "0"], "--limit"),
        (["runs", "ls", "--output-format", "yaml"], "--output-format"),
        (["explain", "RUNTIME_GPU_OOM", "--all"], "not both"),
        (["runs", "ls", "--exit-profile", "slurm"], "unknown exit profile 'slurm'"),
    ],
)
def test_a_mistake_of_usage_is_64_and_says_what_is_wrong(capsys: Captured, arguments: list[str], said: str) -> None:
    assert main(arguments) == 64
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err.splitlines()[0]
    assert "INPUT_VALIDATION_FAILED" in captured.err
    assert "Traceback" not in captured.err


def test_a_mistake_of_usage_too_is_one_document_in_json(capsys: Captured) -> None:
    assert main(["train", "--output-format", "json"]) == 64
    assert document(capsys)["code"] == "INPUT_VALIDATION_FAILED"


def test_an_unknown_code_is_answered_with_the_closest(capsys: Captured) -> None:
    assert main(["explain", "RUNTIME_GPU_OM"]) == 64
    assert "RUNTIME_GPU_OOM" in capsys.readouterr().err


def test_a_code_is_explained_by_any_of_its_names(capsys: Captured) -> None:
    for name in ("RUNTIME_NAN_LOSS", "TRAINING.NAN_LOSS", "runtime_nan_loss"):
        assert main(["explain", name]) == 0
        assert capsys.readouterr().out.startswith("RUNTIME_NAN_LOSS ")


@pytest.mark.parametrize("arguments", [["explain"], ["explain", "--all"]])
def test_all_codes_are_listed(capsys: Captured, arguments: list[str]) -> None:
    assert main(arguments) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == set(registry())


@pytest.mark.parametrize("flag", [["--json"], ["--output-format", "json"], ["--output-format=json"]])
def test_explanations_are_given_as_json(capsys: Captured, flag: list[str]) -> None:
    assert main(["explain", "RUNTIME_GPU_OOM", *flag]) == 0
    assert document(capsys)["exit_code"] == 81
    assert main(["explain", "--all", *flag]) == 0
    assert {one["code"] for one in document(capsys)} == set(registry())


def test_a_dry_run_shows_every_setting_with_its_origin_and_makes_nothing(
    work: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WARDEN_TRAINER__SEED", "5")
    assert main(["train", "demo.yaml", "-o", "trainer.max_steps=30", "--resume", "must", "--dry-run"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["trainer.max_steps", "30", "flag"] in rows
    assert ["trainer.seed", "5", "environment", "WARDEN_TRAINER__SEED"] in rows
    assert ["trainer.learning_rate", "0.0001", "demo.yaml:4"] in rows
    assert ["guard.resume", "must", "flag"] in rows
    assert ["guard.keep_last", "2", "default"] in rows
    assert [path.name for path in work.iterdir()] == ["demo.yaml"]


def test_a_dry_run_is_given_as_json(work: Path, capsys: Captured) -> None:
    assert main(["train", "demo.yaml", "--dry-run", "--output-format", "json"]) == 0
    shown = document(capsys)
    assert shown["config"]["trainer"]["max_steps"] == 20
    assert shown["provenance"]["trainer.max_steps"] == "demo.yaml:4"


@pytest.mark.parametrize(
    ("arguments", "code", "status"),
    [
        (["train", "none.yaml"], "INPUT_CONFIG_NOT_FOUND", 66),
        (["train", "broken.yaml"], "CONFIG_INVALID", 78),
        (["train", "demo.yaml", "-o", "trainer.max_stepz=4"], "CONFIG_INVALID", 78),
        (["train", "demo.yaml", "-o", "trainer.max_steps=-4"], "CONFIG_INVALID_SETTING", 78),
        (["train", "demo.yaml", "-o", "trainer.max_steps"], "INPUT_VALIDATION_FAILED", 64),
        (["resume", "nobody"], "INPUT_RUN_NOT_FOUND", 66),
        (["runs", "show", "nobody"], "INPUT_RUN_NOT_FOUND", 66),
    ],
)
def test_bad_input_ends_in_its_code_and_status_without_a_traceback(
    work: Path, capsys: Captured, arguments: list[str], code: str, status: int
) -> None:
    (work / "broken.yaml").write_text("a: [1\nb: 2\n")
    before = sorted(path.name for path in work.iterdir())
    assert main(arguments) == status
    captured = capsys.readouterr()
    assert code in captured.err
    assert f"warden explain {code}" in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert main([*arguments, "--output-format", "json"]) == status
    envelope = document(capsys)
    assert (envelope["code"], envelope["exit_code"]) == (code, status)
    assert sorted(path.name for path in work.iterdir()) == before


def test_debug_adds_the_traceback(work: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["train", "none.yaml", "--debug"]) == 66
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("WARDEN_DEBUG", "1")
    assert main(["train", "none.yaml"]) == 66
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("WARDEN_DEBUG", "0")
    assert main(["train", "none.yaml"]) == 66
    assert "Traceback" not in capsys.readouterr().err


def test_an_exit_profile_changes_the_status_and_not_the_document(
    work: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["train", "none.yaml", "--output-format", "json"]
    assert main([*arguments, "--exit-profile", "genolewm"]) == 2
    envelope = document(capsys)
    assert (envelope["code"], envelope["exit_code"], envelope["exit_profile"]) == (
        "INPUT_CONFIG_NOT_FOUND",
        66,
        "genolewm",
    )
    monkeypatch.setenv("WARDEN_EXIT_PROFILE", "backpropagate")
    assert main(arguments) == 1
    assert main([*arguments, "--exit-profile=warden"]) == 66


def failing_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(commands, "_find", fail)


def test_what_nobody_foresaw_is_our_bug(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_with(monkeypatch, KeyError("status"))
    assert main(["runs", "show", "x"]) == 70
    captured = capsys.readouterr()
    assert "INTERNAL_ERROR" in captured.err
    assert "KeyError: 'status'" in captured.err
    assert "Traceback" not in captured.err
    assert main(["runs", "show", "x", "--output-format", "json"]) == 70
    assert document(capsys)["code"] == "INTERNAL_ERROR"


def test_a_second_interrupt_is_130(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_with(monkeypatch, KeyboardInterrupt())
    assert main(["runs", "show", "x"]) == 130
    assert "stopped at once" in capsys.readouterr().err
    assert main(["runs", "show", "x", "--output-format", "json"]) == 130
    assert document(capsys)["exit_code"] == 130


def test_a_failure_tells_where_it_stood_and_how_to_go_on(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    error = TrainingAbortedError(
        reason="SIGTERM", steps_completed=40, checkpoint_path="c/step-40", resume_command="warden resume runs/a"
    )
    failing_with(monkeypatch, error)
    assert main(["runs", "show", "x"]) == 75
    shown = capsys.readouterr().err
    for said in ("SIGTERM", "40", "c/step-40", "warden resume runs/a", "warden explain RUNTIME_TRAINING_ABORTED"):
        assert said in shown


def test_a_reader_that_goes_away_is_no_failure() -> None:
    command = f"{sys.executable} -m trainwarden.cli.main explain --all --json | head -1; echo ${{PIPESTATUS[0]}}"
    answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["[", "0"]
    assert answer.stderr == ""


def test_a_reader_that_goes_away_changes_no_exit_status() -> None:
    """A refusal must not pass for success in ``warden preflight … | head`` under ``set -o pipefail``."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "trainwarden.cli.main", "runs", "show", "no-such-run", "--output-format", "json"]
    try:
        answer = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writing)
    assert answer.returncode == 66
    assert "BrokenPipe" not in answer.stderr


@pytest.fixture
def own_run(work: Path) -> str:
    """A run of a script of the user's own, as `Guard` leaves it."""
    with RunDirectory.open("runs/own", command=["python", "train.py", "--x"]) as directory:
        Ledger().started(run_id=directory.run_id, path=directory.path, command=["python", "train.py", "--x"])
        Ledger().finished(directory.run_id, status="stopped", steps_completed=7, final_loss=float("nan"))
        lines = [
            {"event": "metrics_logged", "step": 5, "loss": 3.0},
            {"event": "step_skipped", "step": 6},
            {"event": "metrics_logged", "step": 7, "loss": "nan"},
        ]
        directory.events.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return directory.run_id


def test_a_run_of_ones_own_is_resumed_by_its_own_command(own_run: str, capsys: Captured) -> None:
    for reference in (own_run, own_run[:-1], "runs/own"):
        assert main(["resume", reference]) == 64
        assert "python train.py --x" in capsys.readouterr().err
    assert main(["resume", own_run, "--output-format", "json"]) == 64
    assert document(capsys)["resume_command"] == "python train.py --x"


def test_a_run_whose_directory_is_gone_cannot_be_resumed(own_run: str, capsys: Captured, work: Path) -> None:
    (work / "runs").rename(work / "elsewhere")
    assert main(["resume", own_run]) == 64
    assert "is gone" in capsys.readouterr().err


def test_runs_are_listed(own_run: str, capsys: Captured) -> None:
    assert main(["runs", "ls"]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.startswith("RUN ")
    assert line.split()[:2] == [own_run, "stopped"]
    assert " NaN " in line
    assert main(["runs", "ls", "--output-format", "json"]) == 0
    [row] = document(capsys)["runs"]
    assert (row["run_id"], row["final_loss"], row["steps_skipped"]) == (own_run, "nan", None)


def test_no_runs_are_a_note_and_an_empty_list(work: Path, capsys: Captured) -> None:
    assert main(["runs", "ls", "--output-format", "json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"runs": []}
    assert "no run has been recorded" in captured.err


def test_a_run_is_shown_with_its_curve(own_run: str, capsys: Captured) -> None:
    assert main(["runs", "show", own_run]) == 0
    shown = capsys.readouterr().out
    assert "resume with  python train.py --x" in shown
    assert "s step skipped: 1" in shown
    assert main(["runs", "show", "runs/own", "--output-format", "json"]) == 0
    page = document(capsys)
    assert page["losses"] == [[5, 3.0], [7, "nan"]]
    assert page["run"]["run_id"] == own_run


def test_a_run_is_shown_in_ascii_where_nothing_else_can_be_printed(own_run: str) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "trainwarden.cli.main", "runs", "show", "runs/own"],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert b"  _x\n" in answer.stdout


def test_a_path_that_the_terminal_cannot_spell_does_not_end_a_command(work: Path) -> None:
    with RunDirectory.open("runs/läuft", command=["python", "träning.py"]) as directory:
        Ledger().started(run_id=directory.run_id, path=directory.path, command=["python", "träning.py"])
    environ = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for form in ("text", "json"):
        command = [sys.executable, "-m", "trainwarden.cli.main", "runs", "ls", "--output-format", form]
        answer = subprocess.run(command, capture_output=True, check=True, env=environ)
        assert b"uft" in answer.stdout
    assert json.loads(answer.stdout)["runs"][0]["path"].endswith("läuft")


def test_a_damaged_ledger_is_74_and_kept(warden_home: Path, capsys: Captured) -> None:
    (warden_home / "ledger.sqlite").write_bytes(b"garbage" * 1000)
    assert main(["runs", "ls"]) == 74
    assert "STATE_LEDGER_INVALID" in capsys.readouterr().err
    assert (warden_home / "ledger.sqlite").read_bytes() == b"garbage" * 1000


def test_the_machine_is_probed(capsys: Captured) -> None:
    assert main(["probe", "--output-format", "json"]) == 0
    assert {"python", "devices", "abilities", "quantities", "packages"} <= set(document(capsys))
    assert main(["probe"]) == 0
    assert "bf16" in capsys.readouterr().out


def test_a_machine_that_meets_the_requirements_is_0(capsys: Captured) -> None:
    assert main(["probe", "--require", "ram>=1MiB", "--require", "disk>=1MiB"]) == 0
    assert "ram>=1MiB   met: found" in capsys.readouterr().out
    assert main(["probe", "--require", "ram>=1MiB", "--output-format", "github"]) == 0
    assert capsys.readouterr().out == ""


def test_a_machine_that_lacks_something_is_69_with_each_lack_named(capsys: Captured) -> None:
    lacking = ["probe", "--require", "ram>=900TiB", "--require", "ram>=1MiB", "--require", "gpus>=4096"]
    assert main(lacking) == 69
    printed = capsys.readouterr()
    assert "2 of 3 requirements are not met: ram>=900TiB: found" in printed.err
    assert "DEP_REQUIREMENT_UNMET" in printed.err
    assert "abilities\n" in printed.out
    assert main([*lacking, "--output-format", "json"]) == 69
    failure = document(capsys)
    assert [one["requirement"] for one in failure["details"]["unmet"]] == ["ram>=900TiB", "gpus>=4096"]
    assert failure["details"]["report"]["met"] is False
    assert main([*lacking, "--output-format=github"]) == 69
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("::found")[0] for line in lines] == [
        "::error title=ram>=900TiB is unmet",
        "::error title=gpus>=4096 is unmet",
    ]


def test_a_requirement_that_nobody_understands_is_78_with_the_known_names(capsys: Captured) -> None:
    assert main(["probe", "--require", "vrm>=80GiB"]) == 78
    printed = capsys.readouterr()
    assert "CONFIG_INVALID_SETTING" in printed.err
    assert "did you mean vram?" in printed.err
    assert not printed.out


@given(st.lists(st.sampled_from(["--debug", "--output-format", "json", "text", "--json", "--", "x", "-o"])))
def test_what_the_user_wants_to_see_is_read_from_any_arguments(arguments: list[str]) -> None:
    output = Output.wanted(arguments)
    ours = arguments[: arguments.index("--")] if "--" in arguments else arguments
    assert output.debug == ("--debug" in ours)
    if "--output-format" not in ours and "--json" not in ours:
        assert not output.json


WORDS = ["train", "resume", "runs", "ls", "show", "explain", "--help", "--all", "-o", "a=b", "x", "--debug", "", "-n"]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(WORDS), max_size=4))
def test_whatever_is_typed_ends_with_a_status_of_the_table(arguments: list[str]) -> None:
    assert main(arguments) in (0, 64, 66, 78)
