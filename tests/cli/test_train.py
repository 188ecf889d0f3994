"""The whole way, from a YAML file to a run in the list: trained, interrupted, resumed, refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import ended_when_hung
from trainwarden.cli.main import main
from trainwarden.runs import read_events

Captured = pytest.CaptureFixture[str]

CONFIG = """\
output_dir: runs/tiny
model:
  mode: full
  config:
    model_type: llama
    hidden_size: 16
    intermediate_size: 32
    num_hidden_layers: 1
    num_attention_heads: 2
    vocab_size: 300
    max_position_embeddings: 32
data: {train: rows.jsonl, max_length: 32}
trainer: {max_steps: 12, learning_rate: 1e-3, batch_size: 4, log_every_steps: 4}
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    rows = [{"prompt": f"What is {n} plus one?", "response": f"It is {n + 1}."} for n in range(64)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def document(capsys: Captured) -> Any:
    return json.loads(capsys.readouterr().out)


def test_a_run_is_trained_listed_and_shown(work: Path, capsys: Captured) -> None:
    assert main(["train", "tiny.yaml"]) == 0
    captured = capsys.readouterr()
    assert "status           finished" in captured.out
    assert "steps            12" in captured.out
    assert [line.split()[1] for line in captured.err.splitlines() if line.startswith("step ")] == [
        "1/12",
        "4/12",
        "8/12",
        "12/12",
    ]
    assert main(["runs", "ls", "--output-format", "json"]) == 0
    [row] = document(capsys)["runs"]
    assert (row["status"], row["steps_completed"], row["exit_code"]) == ("finished", 12, 0)
    assert Path(row["checkpoint_path"]).is_dir()
    assert main(["runs", "show", "runs/tiny"]) == 0
    shown = capsys.readouterr().out
    assert "loss  step 1:" in shown
    assert "resume with" not in shown
    assert main(["train", "tiny.yaml", "--resume", "never"]) == 78
    assert "STATE_RUN_EXISTS" in capsys.readouterr().err


def test_the_result_is_one_json_document(work: Path, capsys: Captured) -> None:
    assert main(["train", "tiny.yaml", "-o", "trainer.max_steps=2", "--output-format", "json"]) == 0
    result = document(capsys)
    assert (result["status"], result["steps_completed"], result["exit_code"]) == ("finished", 2, 0)


HELD_AT_STEP_1 = """
import signal, sys
# Whoever runs the tests in the background may have started them with Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
write = sys.stderr.write

def hold(text):
    written = write(text)
    if text.startswith("step 1/"):
        write("\\n")  # whose own end of the line comes later
        sys.stderr.flush()
        sys.stdin.readline()  # the run stands here until the test has seen its signal noticed
    return written

sys.stderr.write = hold
from trainwarden.cli.main import main
sys.exit(main())
"""


def interrupted(*arguments: str) -> tuple[int, str]:
    """Exit status and stdout of ``warden`` that gets a Ctrl-C in step 1."""
    with subprocess.Popen(
        [sys.executable, "-c", HELD_AT_STEP_1, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        said = ""
        with ended_when_hung(process.kill):
            for line in process.stderr:
                said += line
                if line.startswith("step 1/"):
                    process.send_signal(signal.SIGINT)
                if "SIGINT: finishing the step" in line:
                    process.stdin.close()
            out = process.stdout.read()
    assert "SIGINT: finishing the step" in said, said
    return process.returncode, out


def test_ctrl_c_finishes_the_step_and_resume_finishes_the_run(work: Path, capsys: Captured) -> None:
    status, out = interrupted("train", "tiny.yaml", "--output-format", "json")
    assert status == 75
    envelope = json.loads(out)
    assert envelope["code"] == "RUNTIME_TRAINING_ABORTED"
    assert envelope["resume_command"] == "warden resume runs/tiny"
    stopped_at = envelope["steps_completed"]
    assert 1 <= stopped_at <= 2
    assert Path(envelope["checkpoint_path"]).is_dir()

    assert main(["resume", envelope["run_id"], "--output-format", "json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["run_id"], result["steps_completed"]) == (envelope["run_id"], 12)
    assert f"continues after step {stopped_at}" in captured.err
    names = [event["event"] for event in read_events("runs/tiny/events.jsonl")]
    assert names.count("resumed") == 1
    assert main(["runs", "show", "runs/tiny", "--output-format", "json"]) == 0
    page = document(capsys)
    assert (page["run"]["status"], page["run"]["starts"]) == ("finished", 2)
    steps = [step for step, _ in page["losses"]]
    assert steps == sorted(set(steps))
    assert steps[-1] == 12


@pytest.mark.parametrize(
    ("line", "code", "status"),
    [("{broken", "INPUT_DATASET_PARSE_FAILED", 65), ('{"question": 1}', "INPUT_DATASET_FORMAT_UNSUPPORTED", 65)],
)
def test_a_bad_row_is_named_by_its_line(work: Path, capsys: Captured, line: str, code: str, status: int) -> None:
    with Path("rows.jsonl").open("a") as stream:
        stream.write(line + "\n")
    assert main(["train", "tiny.yaml", "--output-format", "json"]) == status
    envelope = document(capsys)
    assert envelope["code"] == code
    assert envelope["details"]["line"] == 65


def test_data_that_is_not_there_is_named(work: Path, capsys: Captured) -> None:
    assert main(["train", "tiny.yaml", "-o", "data.train=none.jsonl"]) == 66
    assert "INPUT_DATASET_NOT_FOUND" in capsys.readouterr().err


def test_a_model_directory_that_is_empty_is_named(work: Path, capsys: Captured) -> None:
    (work / "model").mkdir()
    assert main(["train", "tiny.yaml", "-o", "model={config: null, name_or_path: model}"]) == 69
    assert "DEP_MODEL_LOAD_FAILED" in capsys.readouterr().err
