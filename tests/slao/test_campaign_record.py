"""The record of a campaign comes back as it was written, and damage to it is passed over or named."""

from __future__ import annotations

import dataclasses
import errno
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoint import faults
from trainwarden.checkpoint import CheckpointStore
from trainwarden.errors import SLAOCheckpointError
from trainwarden.slao.campaign_plan import Attempt, Evaluation, Failure
from trainwarden.slao.campaign_record import CampaignLog, CampaignRecord

TEXT = st.text(max_size=8)
LOSSES = st.dictionaries(TEXT, st.floats(allow_nan=False), max_size=3)
ATTEMPTS = st.builds(
    Attempt,
    number=st.integers(1, 9),
    started_from=st.none() | TEXT,
    settings=st.dictionaries(TEXT, st.none() | st.integers() | TEXT | st.lists(TEXT, max_size=2), max_size=3),
    evaluation=st.none() | st.builds(Evaluation, parent=st.integers(0, 9), digest=TEXT, losses=LOSSES),
    failure=st.none() | st.builds(Failure, code=TEXT, message=TEXT, exit_code=st.integers(64, 93)),
)
RECORDS = st.builds(
    CampaignRecord,
    attempts=st.dictionaries(TEXT, ATTEMPTS, max_size=3),
    merge=st.none() | st.dictionaries(TEXT, TEXT, max_size=2),
)


def log(directory: Path) -> CampaignLog:
    return CampaignLog(directory / "record", on_rejected=lambda path, reason: None)


def record(number: int) -> CampaignRecord:
    return CampaignRecord({"a": Attempt(number, None, {"trainer.max_steps": 3})}, {"mode": "slao"})


@settings(max_examples=25)
@given(written=RECORDS)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, written: CampaignRecord) -> None:
    directory = tmp_path_factory.mktemp("log")
    log(directory).write(written)
    assert log(directory).read() == written


def test_a_loss_that_is_no_number_stays_none(tmp_path: Path) -> None:
    evaluation = Evaluation(0, "d", {"a": math.nan})
    log(tmp_path).write(CampaignRecord({"a": Attempt(1, None, {}, evaluation)}))
    found = log(tmp_path).read().attempts["a"].evaluation
    assert found is not None
    assert math.isnan(found.losses["a"])


def test_the_newest_version_counts_and_few_are_kept(tmp_path: Path) -> None:
    assert log(tmp_path).read() == CampaignRecord()
    assert not (tmp_path / "record").exists()
    writer = log(tmp_path)
    for number in (1, 2, 3):
        writer.write(record(number))
    again = log(tmp_path)
    assert again.read() == record(3)
    again.write(record(4))
    assert log(tmp_path).read() == record(4)
    assert len(list((tmp_path / "record").iterdir())) == 2


def test_a_damaged_version_is_announced_and_the_one_before_it_taken(tmp_path: Path) -> None:
    writer = log(tmp_path)
    writer.write(record(1))
    writer.write(record(2))
    manifest = sorted((tmp_path / "record").glob("*/manifest.json"))[-1]
    manifest.write_bytes(manifest.read_bytes().replace(b'"slao"', b'"slap"', 1))
    told: list[str] = []
    found = CampaignLog(tmp_path / "record", on_rejected=lambda path, reason: told.append(path.name)).read()
    assert found == record(1)
    assert told == [manifest.parent.name]
    manifest.unlink()
    for other in (tmp_path / "record").glob("*/manifest.json"):
        other.write_text("{")
    with pytest.raises(SLAOCheckpointError, match="none is valid"):
        log(tmp_path).read()


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({"kind": "another"}, "not the record of a campaign"),
        ({**record(1).to_json(), "format_version": 99}, "not the record of a campaign"),
        ({**record(1).to_json(), "attempts": {"a": {"number": 1}}}, "make no sense"),
        ({**record(1).to_json(), "attempts": 3}, "make no sense"),
    ],
)
def test_what_verifies_and_is_no_record_is_refused(tmp_path: Path, meta: dict[str, object], said: str) -> None:
    CheckpointStore(tmp_path / "record").save(1, {}, meta)
    with pytest.raises(SLAOCheckpointError, match=said):
        log(tmp_path).read()


def test_a_disk_that_fails_at_any_operation_leaves_the_old_record_or_the_new_one(tmp_path: Path) -> None:
    log(tmp_path / "counted").write(record(1))
    refused = 0
    for position in range(1, faults.count(lambda: log(tmp_path / "again").write(record(1))) + 1):
        directory = tmp_path / str(position)
        writer = log(directory)
        writer.write(record(1))
        try:
            with faults.operations(faults.failing_at(position, errno.EIO)):
                writer.write(record(2))
        except SLAOCheckpointError:
            refused += 1
        assert log(directory).read() in (record(1), record(2))
        writer.write(record(3))
        assert log(directory).read() == record(3)
    assert refused > 3


def test_every_field_of_an_attempt_is_stored() -> None:
    stored = record(1).to_json()["attempts"]["a"]
    assert set(stored) == {field.name for field in dataclasses.fields(Attempt)}
