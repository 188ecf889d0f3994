"""What a person types leads to one run, or to a word about why it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainwarden.errors import ConfigurationError, LedgerError, RunNotFoundError
from trainwarden.runs import Ledger, RunDirectory, find_run


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


def a_run(path: Path, ledger: Ledger | None) -> str:
    with RunDirectory.open(path, command=["python", "train.py"]) as directory:
        if ledger is not None:
            ledger.started(run_id=directory.run_id, path=path, command=["python", "train.py"])
        return directory.run_id


def test_a_directory_and_an_id_lead_to_the_same_run(tmp_path: Path, ledger: Ledger) -> None:
    run_id = a_run(tmp_path / "a", ledger)
    for reference in (str(tmp_path / "a"), run_id, run_id[:-2]):
        found = find_run(reference, ledger)
        assert found.manifest is not None
        assert found.record is not None
        assert found.manifest.run_id == found.record.run_id == run_id
        assert found.resume_command == "python train.py"


def test_a_directory_is_enough_without_a_ledger(tmp_path: Path, ledger: Ledger) -> None:
    run_id = a_run(tmp_path / "a", None)
    found = find_run(str(tmp_path / "a"), ledger)
    assert found.record is None
    assert found.manifest is not None
    assert found.manifest.run_id == run_id


def test_a_directory_that_was_moved_is_found_where_it_is(tmp_path: Path, ledger: Ledger) -> None:
    run_id = a_run(tmp_path / "a", ledger)
    (tmp_path / "a").rename(tmp_path / "b")
    found = find_run(str(tmp_path / "b"), ledger)
    assert found.path == tmp_path / "b"
    assert found.record is not None
    assert found.record.run_id == run_id


def test_a_run_whose_directory_is_gone_is_known_and_cannot_be_resumed(tmp_path: Path, ledger: Ledger) -> None:
    run_id = a_run(tmp_path / "a", ledger)
    (tmp_path / "a").rename(tmp_path / "b")
    found = find_run(run_id, ledger)
    assert found.record is not None
    assert found.manifest is None
    assert found.resume_command is None


def test_a_directory_that_is_another_runs_by_now_is_not_taken_for_the_old_one(tmp_path: Path, ledger: Ledger) -> None:
    old = a_run(tmp_path / "a", ledger)
    (tmp_path / "a").rename(tmp_path / "b")
    new = a_run(tmp_path / "a", None)
    assert new != old
    assert find_run(old, ledger).manifest is None


def test_a_damaged_ledger_is_no_obstacle_to_who_names_the_directory(tmp_path: Path, ledger: Ledger) -> None:
    run_id = a_run(tmp_path / "a", None)
    ledger.path.write_bytes(b"garbage" * 1000)
    assert find_run(str(tmp_path / "a"), ledger).record is None
    with pytest.raises(LedgerError):
        find_run(run_id, ledger)


def test_a_directory_with_a_foreign_run_json_is_refused(tmp_path: Path, ledger: Ledger) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ConfigurationError):
        find_run(str(tmp_path), ledger)


@pytest.mark.parametrize("reference", ["", "none", "."])
def test_what_is_no_run_is_not_found(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunNotFoundError):
        find_run(reference, ledger)
