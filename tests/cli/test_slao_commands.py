"""Merging on the command line: what is printed, what is written, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.slao.adapters import fingerprint, saved, state
from trainwarden import slao
from trainwarden.cli.main import main

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc", start=1):
        saved(tmp_path / name, state(seed))
    return tmp_path


def bad(directory: Path) -> Path:
    tensors = state(9)
    tensors[next(key for key in tensors if "lora_B" in key)][1, 1] = float("nan")
    return saved(directory, tensors)


def document(capsys: Captured) -> Any:
    return json.loads(capsys.readouterr().out)


def test_three_adapters_become_one_that_loads(work: Path, capsys: Captured) -> None:
    assert main(["slao", "merge", "a", "b", "c", "--output", "m"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].split()[:3] == ["SNAPSHOT", "WHAT", "ADAPTERS"]
    assert [line.split()[:4] for line in lines[1:4]] == [
        ["1", "start", "1", "a"],
        ["2", "slao", "2", "b"],
        ["3", "slao", "3", "c"],
    ]
    assert "0.7071" in lines[2]
    assert "0.5774" in lines[3]
    assert 'PeftModel.from_pretrained(model, "m")' in lines[-1]
    assert set(load_file("m/adapter_model.safetensors")) == set(state(1))


def test_a_missing_lineage_is_a_warning_with_the_overlap(work: Path, capsys: Captured) -> None:
    assert main(["slao", "merge", "a", "b", "--output", "m"]) == 0
    captured = capsys.readouterr()
    [note] = captured.err.splitlines()
    assert note.startswith("warden: adapter 2 (b) has no recorded lineage; its A subspaces overlap by 0.")
    assert "overlap 0." in captured.out


def test_a_recorded_lineage_is_no_warning(work: Path, capsys: Captured) -> None:
    slao.record_lineage("b", slao.Start(2, slao.read_adapter("a").digest()))
    assert main(["slao", "merge", "a", "b", "--output", "m"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "recorded" in captured.out


def test_the_result_is_one_json_document(work: Path, capsys: Captured) -> None:
    arguments = ["slao", "merge", "a", "b", "--output", "m", "--mode", "average", "--schedule", "inverse"]
    assert main([*arguments, "--output-format", "json"]) == 0
    found = document(capsys)
    assert (found["output"], found["snapshot"], found["index"]) == ("m", 2, 2)
    assert [(one["mode"], one["weight"]) for one in found["merges"]] == [("average", 1.0), ("average", 0.5)]
    assert len(found["notes"]) == 1


def test_settings_reach_the_merge(work: Path) -> None:
    options = ["--schedule", "constant", "--constant", "0.25"]
    assert main(["slao", "merge", "a", "b", "--output", "m", *options]) == 0
    merged, key = load_file("m/adapter_model.safetensors"), next(key for key in state(1) if "lora_B" in key)
    assert torch.equal(merged[key], torch.lerp(state(1)[key], state(2)[key], 0.25))


def test_a_divergence_is_80_and_nothing_is_written(work: Path, capsys: Captured) -> None:
    bad(work / "bad")
    assert main(["slao", "merge", "a", "b", "bad", "--output", "m"]) == 80
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "merge 3, of bad, diverged at layers.0.self_attn.q_proj.lora_B.weight: the adapter holds NaN" in captured.err
    assert "SLAO_MERGE_DIVERGED" in captured.err
    assert not Path("m").exists()


def test_a_divergence_in_an_older_output_changes_nothing_and_names_the_good_snapshot(
    work: Path, capsys: Captured
) -> None:
    bad(work / "bad")
    assert main(["slao", "merge", "a", "b", "--output", "m"]) == 0
    before = fingerprint(Path("m"))
    capsys.readouterr()
    assert main(["slao", "merge", "m", "bad", "--output", "m", "--output-format", "json"]) == 80
    found = document(capsys)
    assert fingerprint(Path("m")) == before
    assert (found["code"], found["details"]["run_index"]) == ("SLAO_MERGE_DIVERGED", 3)
    assert found["checkpoint_path"] == "m/snapshots/step-00000002"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["merge", "a", "--output", "m"], 64, "give at least two adapters"),
        (["merge", "a", "b"], 64, "--output"),
        (["merge", "a", "b", "--output", "m", "--mode", "median"], 64, "--mode"),
        (["merge", "a", "b", "--output", "m", "--density", "0"], 78, "the setting density is 0.0"),
        (["merge", "a", "nowhere", "--output", "m"], 66, "there is no adapter in nowhere: there is no such directory"),
        (["merge", "a", "alpha", "--output", "m"], 65, "lora_alpha is 64, and 6 in the accumulator"),
        (["merge", "a", "torn", "--output", "m"], 65, "the adapter torn cannot be merged: it is damaged"),
        (["merge", "a", "b", "--output", "c"], 78, "a new directory, or one that an earlier merge wrote"),
        (["history", "nowhere"], 66, "there is no merge history in nowhere"),
        (["history", "a"], 66, "it is not the output of a merge"),
        (["rollback", "a", "--to", "1"], 66, "there is no merge history in a"),
        (["rollback", "a", "--to", "0"], 64, "--to"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_said_in_one_block(
    work: Path, capsys: Captured, arguments: list[str], status: int, said: str
) -> None:
    saved(work / "alpha", state(4), lora_alpha=64)
    file = saved(work / "torn", state(4)) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    before = fingerprint(work)
    assert main(["slao", *arguments]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err.splitlines()[0]
    assert "Traceback" not in captured.err
    assert fingerprint(work) == before


def test_the_history_shows_states_and_a_rollback_goes_back(work: Path, capsys: Captured) -> None:
    assert main(["slao", "merge", "a", "b", "c", "--output", "m"]) == 0
    second = slao.SlaoStore("m").at(2).exported()
    capsys.readouterr()
    assert main(["slao", "rollback", "m", "--to", "2"]) == 0
    assert "m is snapshot 2 again: 2 adapters. It is now snapshot 4, and exported." in capsys.readouterr().out
    exported = load_file("m/adapter_model.safetensors")
    assert all(torch.equal(exported[key], second[key]) for key in second)
    assert main(["slao", "history", "m"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1:5]] == ["kept", "kept", "kept", "current"]
    assert "rollback" in lines[4]
    assert lines[-1] == "The adapter in m is snapshot 4."
    assert main(["slao", "history", "m", "--output-format", "json"]) == 0
    found = document(capsys)
    assert found["exported_snapshot"] == 4
    assert [one["action"] for one in found["history"]] == ["start", "merge", "merge", "rollback"]


def test_a_number_that_is_not_kept_is_74(work: Path, capsys: Captured) -> None:
    assert main(["slao", "merge", "a", "b", "--output", "m"]) == 0
    assert main(["slao", "rollback", "m", "--to", "7"]) == 74
    assert "STATE_SLAO_CHECKPOINT_INVALID" in capsys.readouterr().err


def test_a_damaged_newest_snapshot_is_announced_once(work: Path, capsys: Captured) -> None:
    assert main(["slao", "merge", "a", "b", "c", "--output", "m"]) == 0
    file = Path("m/snapshots/step-00000003/merged.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    capsys.readouterr()
    assert main(["slao", "history", "m"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("step-00000003 is damaged and was passed over") == 1
    assert "The adapter in m is still snapshot 3" in captured.out
    assert "warden slao rollback m --to 2" in captured.out
    assert main(["slao", "rollback", "m", "--to", "2"]) == 0
    assert slao.SlaoStore("m", on_rejected=lambda path, reason: None).exported_sequence == 4


def test_a_merge_that_was_killed_before_its_export_says_how_to_finish_it(work: Path, capsys: Captured) -> None:
    assert main(["slao", "merge", "a", "b", "--output", "m"]) == 0
    Path("m/adapter_model.safetensors").unlink()
    capsys.readouterr()
    assert main(["slao", "history", "m"]) == 0
    assert "is missing or incomplete: the merge was interrupted" in capsys.readouterr().out
    with slao.SlaoStore("n").writing():
        pass
    assert main(["slao", "history", "n"]) == 0
    assert capsys.readouterr().out == "nothing has been merged into n yet\n"


@pytest.mark.parametrize("arguments", [["slao", "--help"], ["slao", "merge", "--help"], ["slao", "run", "--help"]])
def test_help_needs_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom trainwarden.cli.main import main\nmain(sys.argv[1:])\n"
        "print([n for n in ('torch', 'peft', 'rich') if n in sys.modules], file=sys.stderr)"
    )
    answer = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert answer.stderr.splitlines()[-1] == "[]"


def test_merging_directories_needs_no_peft(work: Path) -> None:
    code = "import sys\nfrom trainwarden.cli.main import main\nsys.exit(main(sys.argv[1:]) or 'peft' in sys.modules)"
    command = [sys.executable, "-c", code, "slao", "merge", "a", "b", "--output", "m"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
