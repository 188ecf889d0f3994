"""Result files say what they were measured on, and nothing about whose machine it was."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import benchkit
import pytest

from tests.benchmarks.conftest import BENCHMARKS

RESULTS = sorted((BENCHMARKS / "results").glob("*.json"))


def test_a_table_lines_up_and_keeps_every_cell() -> None:
    table = benchkit.markdown_table(("model", "µs"), [("small", "1"), ("larger", "23")])
    assert table.splitlines() == [
        "| model  | µs |",
        "|--------|----|",
        "| small  | 1  |",
        "| larger | 23 |",
    ]


def test_the_environment_names_device_versions_date_and_command() -> None:
    facts = benchkit.environment("python benchmarks/x.py", "cpu", ["torch", "no-such-package"])
    assert facts["command"] == "python benchmarks/x.py"
    assert facts["device"].startswith("CPU")
    assert set(facts["versions"]) == {"torch"}
    assert len(facts["date"].split("-")) == 3


def test_a_result_with_a_nan_is_refused_rather_than_written_as_broken_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        benchkit.write_json(tmp_path / "result.json", {"distance": float("nan")})


def test_there_are_committed_results_of_every_benchmark() -> None:
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")} - {"benchkit"}
    assert {path.stem for path in RESULTS} == scripts


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_hold_no_host_name_and_no_machine_path(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert socket.gethostname() not in text
    assert not [piece for piece in ("/home/", "/root/", "/tmp/", "/work/", "/Users/") if piece in text]
    facts = json.loads(text)["environment"]
    assert facts["command"].startswith(f"python benchmarks/{path.stem}.py --")
    assert {"date", "device", "versions"} <= set(facts)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_tables_in_the_readme_are_those_of_the_committed_results(path: Path) -> None:
    readme = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    table = path.with_suffix(".md").read_text(encoding="utf-8")
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert rows
    assert not [row for row in rows if row not in readme]
