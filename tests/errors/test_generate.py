"""docs/errors is written from the classes and checked against them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from trainwarden.errors import EXIT_STATUSES, explain_all_json, registry
from trainwarden.errors.generate import MARKER, differences, main, pages, write


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    assert main(["--directory", str(tmp_path / "errors")]) == 0
    return tmp_path / "errors"


def test_there_is_one_page_a_code_and_the_files_that_tools_read(docs: Path) -> None:
    extra = {"index.md", "exit-status.md", "codes.json", "sarif-rules.json"}
    assert {path.name for path in docs.iterdir()} == {f"{code}.md" for code in registry()} | extra


def test_what_was_just_written_is_up_to_date(docs: Path) -> None:
    assert main(["--check", "--directory", str(docs)]) == 0
    assert differences(docs) == []


def test_a_changed_page_fails_the_check_with_a_diff(docs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = docs / "RUNTIME_GPU_OOM.md"
    page.write_text(page.read_text(encoding="utf-8").replace("# RUNTIME_GPU_OOM", "# Changed"), encoding="utf-8")
    assert main(["--check", "--directory", str(docs)]) == 83
    printed = capsys.readouterr().err
    assert "-# Changed\n+# RUNTIME_GPU_OOM" in printed
    assert "run python -m trainwarden.errors.generate" in printed
    assert page.read_text(encoding="utf-8").count("# Changed") == 1  # a check writes nothing


def test_a_missing_page_fails_the_check(docs: Path) -> None:
    (docs / "RUNTIME_GPU_OOM.md").unlink()
    assert differences(docs) == [f"missing: {docs / 'RUNTIME_GPU_OOM.md'}"]


def test_a_missing_directory_fails_the_check_briefly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", "--directory", str(tmp_path / "none")]) == 83
    assert len(capsys.readouterr().err.splitlines()) <= 41
    assert not (tmp_path / "none").exists()


def test_only_left_over_pages_of_ours_are_removed(docs: Path) -> None:
    (docs / "OLD_CODE.md").write_text(f"{MARKER}\n# OLD_CODE\n", encoding="utf-8")
    (docs / "notes.md").write_text("# mine\n", encoding="utf-8")
    assert differences(docs) == [f"left over: {docs / 'OLD_CODE.md'}"]
    write(docs)
    assert not (docs / "OLD_CODE.md").exists()
    assert (docs / "notes.md").exists()
    assert differences(docs) == []


def test_every_link_between_pages_leads_somewhere() -> None:
    files = pages()
    for name, text in files.items():
        if name.endswith(".md"):
            assert set(re.findall(r"\]\(([^)]+)\)", text)) <= set(files), name


def test_the_json_list_is_what_explain_prints() -> None:
    assert json.loads(pages()["codes.json"]) == json.loads(explain_all_json())


def test_the_exit_table_names_every_status_and_every_code() -> None:
    text = pages()["exit-status.md"]
    rows = {int(row[0]): row[1] for row in re.findall(r"^\| (\d+) \| (.*)$", text, re.MULTILINE)}
    assert set(rows) == {*EXIT_STATUSES, 130, 143}
    for code, condition in registry().items():
        assert f"[{code}]({code}.md)" in rows[condition.exit_code]


def test_the_kubernetes_policy_is_valid_and_treats_every_failure_once() -> None:
    snippet = re.search(r"```yaml\n(.*?)```", pages()["exit-status.md"], re.DOTALL)
    assert snippet
    spec = yaml.safe_load(snippet[1])["spec"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # the API refuses a podFailurePolicy otherwise
    rules = spec["podFailurePolicy"]["rules"]
    by_action = {rule["action"]: rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule}
    assert by_action["Ignore"] == [75]
    listed = [status for values in by_action.values() for status in values]
    assert len(listed) == len(set(listed))
    assert 0 not in listed  # the API refuses 0 with the operator In
    assert set(EXIT_STATUSES) - set(listed) == {0, 69, 82, 86}


def test_the_sarif_rules_are_a_log_that_tools_can_load() -> None:
    log = json.loads(pages()["sarif-rules.json"])
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert run["results"] == []
    assert [rule["id"] for rule in rules] == sorted(registry())
    for rule in rules:
        assert rule["shortDescription"]["text"]
        assert rule["help"]["text"]
        assert rule["defaultConfiguration"]["level"] == "error"
