"""`warden preflight` and `warden ceilings`: questions as people type them, and answers with the right exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainwarden.cli.main import main
from trainwarden.errors import registry
from trainwarden.memory.overheads import RunMemory
from trainwarden.runs import Ledger

Captured = pytest.CaptureFixture[str]
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
TINY = {**LLAMA_8B, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 300}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIG = """\
output_dir: runs/demo
model: {config: {model_type: llama, hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4}, mode: full}
data: {train: python-docstrings, max_length: 96}
trainer: {max_steps: 20}
"""


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "8b.json").write_text(json.dumps(LLAMA_8B))
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    (tmp_path / "demo.yaml").write_text(CONFIG)
    return tmp_path


def ask(*arguments: str) -> int:
    return main(["preflight", *arguments])


def document(capsys: Captured) -> Any:
    return json.loads(capsys.readouterr().out)


def test_what_fits_ends_with_0(capsys: Captured) -> None:
    assert ask("8b.json", "--quick", "--gpu", "RTX 4090", "--gradient-checkpointing") == 0
    shown = capsys.readouterr().out
    assert "8b.json fits, with" in shown
    assert "micro-batch" in shown


def test_what_does_not_fit_ends_with_78_and_says_what_would(capsys: Captured) -> None:
    assert ask("8b.json", "--quick", "--gpu", "RTX 4090") == 78
    captured = capsys.readouterr()
    assert "does not fit" in captured.out
    assert "gradient checkpointing" in captured.out
    assert "warden explain PREFLIGHT_REFUSED" in captured.err
    assert "PREFLIGHT_MEMORY" in captured.err


def test_a_waiver_lets_it_pass_and_keeps_the_finding(capsys: Captured) -> None:
    assert ask("8b.json", "--quick", "--gpu", "RTX 4090", "--waive", "PREFLIGHT_MEMORY") == 0
    assert "error (waived) PREFLIGHT_MEMORY" in capsys.readouterr().out


def test_an_unknown_waiver_is_refused(capsys: Captured) -> None:
    assert ask("tiny.json", "--quick", "--vram", "1GiB", "--waive", "PREFLIGHT_MEMRY") == 64
    assert "PREFLIGHT_MEMORY" in capsys.readouterr().err


def test_a_training_configuration_with_an_override(capsys: Captured) -> None:
    assert ask("demo.yaml", "--quick", "--vram", "2GiB", "-o", "trainer.batch_size=2", "--output-format", "json") == 0
    found = document(capsys)
    assert found["plan"]["micro_batch_size"] == 2
    assert found["plan"]["sequence_length"] == 96
    assert found["plan"]["mode"] == "full"


def test_every_part_of_the_plan_can_be_asked_about(capsys: Captured) -> None:
    options = ["--mode", "full", "--weights", "bfloat16", "--batch-size", "3", "--max-length", "128"]
    options += ["--grad-accum-steps", "2", "--optimizer", "adamw_8bit", "--gradient-checkpointing", "--lora-rank", "8"]
    assert ask("8b.json", "--quick", "--gpu", "H100", *options, "--output-format", "json") == 0
    plan = document(capsys)["plan"]
    expected = {
        "mode": "full",
        "weights": "bfloat16",
        "autocast": None,
        "micro_batch_size": 3,
        "sequence_length": 128,
        "grad_accum_steps": 2,
        "optimizer": "adamw_8bit",
        "checkpointing": True,
        "lora_rank": 8,
    }
    assert {name: plan[name] for name in expected} == expected


def test_a_card_without_bfloat16_units_computes_in_float32(capsys: Captured) -> None:
    ask("tiny.json", "--quick", "--gpu", "T4", "--output-format", "json")
    assert document(capsys)["plan"]["weights"] == "float32"


def test_a_refusal_is_one_json_document_with_findings_and_report(capsys: Captured) -> None:
    assert ask("8b.json", "--quick", "--gpu", "RTX 4090", "--output-format", "json") == 78
    failure = document(capsys)
    assert failure["code"] == "PREFLIGHT_REFUSED"
    assert failure["exit_code"] == 78
    assert failure["details"]["findings"][0]["code"] == "PREFLIGHT_MEMORY"
    assert failure["details"]["report"]["fits"] is False


def test_github_gets_annotations(capsys: Captured) -> None:
    assert ask("8b.json", "--quick", "--gpu", "RTX 4090", "--output-format", "github") == 78
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("::error title=PREFLIGHT_MEMORY at RTX 4090::")


def test_the_picture_is_written_and_said(work: Path, capsys: Captured) -> None:
    assert ask("tiny.json", "--quick", "--vram", "1GiB", "--plot", "memory.png") == 0
    assert (work / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert "the picture is in memory.png" in capsys.readouterr().err


def test_a_small_model_is_traced(capsys: Captured) -> None:
    assert ask("tiny.json", "--vram", "1GiB", "--max-length", "32", "--output-format", "json") == 0
    prediction = document(capsys)["prediction"]
    assert prediction["source"] == "traced"
    assert prediction["operation"]


def test_without_a_device_here_the_fitting_cards_are_named(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainwarden.cli.memory_commands._here", lambda: None)
    assert ask("8b.json", "--quick") == 0
    assert "fits on" in capsys.readouterr().out


def test_a_training_on_the_cpu_is_judged_by_host_memory(capsys: Captured) -> None:
    assert ask("demo.yaml", "--quick", "-o", "trainer.device=cpu", "--output-format", "json") == 0
    found = document(capsys)
    assert found["device"]["name"] == "host memory"
    assert found["needed_bytes"] == found["prediction"]["peak_bytes"]
    assert found["plan"]["autocast"] is None


def test_a_model_is_not_asked_about_more_tokens_than_it_has_positions(work: Path, capsys: Captured) -> None:
    (work / "short.json").write_text(json.dumps({**TINY, "max_position_embeddings": 128}))
    ask("short.json", "--quick", "--vram", "1GiB", "--output-format", "json")
    assert document(capsys)["plan"]["sequence_length"] == 128


def test_this_machines_own_runs_replace_the_assumed_overheads(capsys: Captured) -> None:
    ledger = Ledger()
    for run in ("r-1", "r-2", "r-3"):
        ledger.started(run_id=run, path=run, command=["x"])
        memory = RunMemory(device="RTX 4090", predicted_bytes=10, allocated_bytes=10, reserved_bytes=11)
        ledger.note_memory(run, memory)
    ask("tiny.json", "--quick", "--gpu", "RTX 4090")
    assert "10% fragmentation" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 64, "missing argument"),
        (["nowhere.yaml"], 66, "nowhere.yaml"),
        (["org/absent"], 69, "no model of this name in the Hub's cache"),
        (["8b.json", "--gpu", "RTX 4091"], 64, "closest are RTX 4090"),
        (["8b.json", "--vram", "lots"], 64, "a size such as 80GiB"),
        (["8b.json", "--vram", "0GiB"], 64, "a size such as 80GiB"),
        (["8b.json", "--gpu", "H100", "--vram", "1GiB"], 64, "not both"),
        (["8b.json", "--mode", "half"], 64, "half"),
        (["8b.json", "--batch-size", "0"], 64, "batch-size"),
        (["8b.json", "--plot", "a.jpg"], 64, ".png or .svg"),
        (["demo.yaml", "-o", "trainer.batch_sise=1"], 78, "did you mean"),
    ],
)
def test_a_wrong_question_is_answered_with_what_is_wrong(
    arguments: list[str], status: int, said: str, capsys: Captured
) -> None:
    assert ask(*arguments) == status
    assert said in capsys.readouterr().err


def test_the_ceilings_of_a_card(capsys: Captured) -> None:
    assert main(["ceilings", "--gpu", "h100", "--output-format", "json"]) == 0
    found = document(capsys)
    names = [technique["name"] for technique in found["techniques"]]
    billions = dict(zip(names, found["cards"]["H100"]["billions"], strict=True))
    assert billions["full fp32"] < billions["full bf16"] < billions["LoRA"] < billions["QLoRA"]


def test_the_ceilings_of_all_common_cards(capsys: Captured) -> None:
    assert main(["ceilings", "--all"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("RTX 4060", "RTX 4090", "H100", "MI300X", "QLORA"))


@pytest.mark.parametrize("arguments", [["--all", "--gpu", "H100"], ["--gpu", "nothing"], ["--vram", "x"]])
def test_a_wrong_question_about_ceilings(arguments: list[str], capsys: Captured) -> None:
    assert main(["ceilings", *arguments]) == 64
    assert capsys.readouterr().err.startswith("warden: ")


@pytest.mark.parametrize("arguments", [["preflight", "--help"], ["ceilings", "--help"], ["ceilings", "--all"]])
def test_light_answers_import_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom trainwarden.cli.main import main\nmain(sys.argv[1:])\n"
        "print([n for n in ('torch', 'rich', 'transformers') if n in sys.modules], file=sys.stderr)"
    )
    answer = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert answer.stderr.splitlines()[-1] == "[]"


def test_the_codes_are_explained() -> None:
    for code in ("PREFLIGHT_REFUSED", "PREFLIGHT_MEMORY", "PREFLIGHT_HOST_MEMORY", "RUNTIME_FULL_FT_MODEL_TOO_LARGE"):
        assert registry()[code].exit_code == 78
        assert main(["explain", code]) == 0
