"""Rows that cannot be read during a training are left out of their step, not the step out of the training."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.train.tiny import LLAMA, identical, instructions, model_weights, settings
from trainwarden.errors import DataLoaderError, TrainingAbortedError
from trainwarden.events import DataSkipped, Event, StepCompleted
from trainwarden.report.summary import summary_text
from trainwarden.runs import Ledger
from trainwarden.train import Trainer
from trainwarden.train.data import EncodedDataset, training_loader
from trainwarden.train.encode import Encoded

ROWS = instructions(24)


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Indices of the rows that cannot be read, as those of a memory-mapped file on a bad disk."""
    bad: set[int] = set()
    read = EncodedDataset.__getitem__

    def reading(self: EncodedDataset, index: int) -> Encoded:
        if index in bad:
            raise OSError(5, "Input/output error")
        return read(self, index)

    monkeypatch.setattr(EncodedDataset, "__getitem__", reading)
    return bad


def trainer(path: Path, **changes: Any) -> Trainer:
    return Trainer(LLAMA, ROWS, output_dir=path, **settings(**changes))


def test_a_row_that_cannot_be_read_is_left_out_of_its_step(tmp_path: Path, unreadable: set[int]) -> None:
    unreadable |= {3, 17}
    events: list[Event] = []
    result = trainer(tmp_path, max_steps=3, observers=[events.append]).train()  # one epoch
    assert (result.steps_completed, result.data_skipped) == (3, 2)
    records = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    assert sorted(record["index"] for record in records) == [3, 17]
    assert {record["what"] for record in records} == {"sample"}
    assert records[0]["cause"].startswith("OSError: [Errno 5] Input/output error at test_bad_rows.py")
    assert len([event for event in events if isinstance(event, DataSkipped)]) == 2
    shown = dict(line.strip().split("  ", 1) for line in summary_text(result.to_dict()).splitlines())
    assert shown["left out"].strip() == "2"
    assert Ledger().find(result.run_id).data_skipped == 2


def test_too_many_of_them_end_the_training_resumably(tmp_path: Path, unreadable: set[int]) -> None:
    unreadable |= set(range(12))
    with pytest.raises(DataLoaderError) as caught:
        trainer(tmp_path).train()
    assert caught.value.samples_left_out >= 10
    assert caught.value.checkpoint_path is not None
    assert caught.value.resume_command is not None


def test_a_stopped_training_leaves_out_the_same_rows(tmp_path: Path, unreadable: set[int]) -> None:
    unreadable |= {3, 17}
    whole = trainer(tmp_path / "whole").train()

    def stop(event: Event) -> None:
        if isinstance(event, StepCompleted) and event.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingAbortedError):
        trainer(tmp_path / "run", observers=[stop]).train()
    resumed = trainer(tmp_path / "run").train()
    assert identical(model_weights(tmp_path / "run"), model_weights(tmp_path / "whole"))
    assert resumed.data_skipped == whole.data_skipped == 4  # two epochs


def test_the_loader_of_a_healthy_data_set_is_as_it_was() -> None:
    dataset = EncodedDataset([Encoded.of([i] * 3, [i] * 3) for i in range(10)])
    loader = training_loader(dataset, micro_batch_size=2, grad_accum_steps=2, pad_token_id=0, seed=1)
    assert [len(step) for step in loader] == [2, 2, 1]
