"""The record of a run's returns survives a crash at any point, and learning rates are lowered where they are kept."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainwarden.checkpoint import CheckpointStore
from trainwarden.errors import CheckpointError, DiskFullError
from trainwarden.guards.rollback import Place, Rollback, Window
from trainwarden.runtime import rollbacks


def a_return(step: int) -> Rollback:
    window = Window(Place(0, 0, step), Place(0, 0, step + 2))
    return Rollback(window, step - 5, step, step + 1, 0.5, "spike")


def test_what_was_written_is_read_and_a_run_without_a_record_has_no_returns(tmp_path: Path) -> None:
    assert rollbacks.read(tmp_path) == []
    rollbacks.write(tmp_path, [a_return(10)])
    rollbacks.write(tmp_path, [a_return(10), a_return(30)])
    assert rollbacks.read(tmp_path) == [a_return(10), a_return(30)]
    assert [path.name for path in tmp_path.iterdir()] == [rollbacks.FILE]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rollbacks": [{}]}', '{"rollbacks": [{"window": 3}]}', "\x00"])
def test_a_damaged_record_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / rollbacks.FILE).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"rollbacks\.json"):
        rollbacks.read(tmp_path)


class _Crash(BaseException):
    """Nothing may catch it, as nothing catches a kill."""


@pytest.mark.parametrize("name", ["open", "write", "fsync", "rename"])
@pytest.mark.parametrize("call", [1, 2])
def test_a_crash_at_any_call_leaves_the_old_record_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int
) -> None:
    rollbacks.write(tmp_path, [a_return(10)])
    real, count = getattr(os, name), 0

    def crashing(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            raise _Crash
        return real(*arguments, **options)

    monkeypatch.setattr(os, name, crashing)
    with suppress(_Crash):
        rollbacks.write(tmp_path, [a_return(10), a_return(30)])
    monkeypatch.undo()
    assert rollbacks.read(tmp_path) in ([a_return(10)], [a_return(10), a_return(30)])
    rollbacks.write(tmp_path, [a_return(40)])
    assert rollbacks.read(tmp_path) == [a_return(40)]


def test_a_full_disk_is_said_to_be_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DiskFullError):
        rollbacks.write(tmp_path, [a_return(10)])
    monkeypatch.undo()
    assert rollbacks.read(tmp_path) == []


def test_newer_checkpoints_go_and_older_ones_stay(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=9)
    for step in (10, 20, 20, 30):
        store.save(step, {"model": {"w": torch.ones(2)}}, {})
    (tmp_path / "step-00000030" / "mine.txt").write_text("the user's", encoding="utf-8")
    rollbacks.drop_newer(tmp_path, 15)
    assert rollbacks.checkpoint_steps(tmp_path) == [10]
    assert (tmp_path / "step-00000030" / "mine.txt").exists()
    assert store.load_newest(on_rejected=lambda path, why: pytest.fail(why)) is not None
    assert rollbacks.checkpoint_steps(tmp_path / "absent") == []


SCHEDULERS: dict[str, Any] = {
    "none": lambda o: None,
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "linear": lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=9),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.4, total_steps=12),
    "one after the other": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.5, 1.0, 4), torch.optim.lr_scheduler.CosineAnnealingLR(o, 8)],
        [4],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_all_later_learning_rates_are_lowered_by_the_factor(name: str) -> None:
    def rates(factor_at: int | None) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        scheduler = SCHEDULERS[name](optimizer)
        found = []
        for step in range(10):
            if step == factor_at:
                others = {} if scheduler is None else {"scheduler": scheduler}
                rollbacks.scale_learning_rates([optimizer], others, 0.25)
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        return found

    plain, scaled = rates(None), rates(6)
    assert scaled[:6] == plain[:6]
    assert scaled[6:] == pytest.approx([rate / 4 for rate in plain[6:]])


def test_a_factor_of_one_changes_nothing_at_all() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    rollbacks.scale_learning_rates([optimizer], {"scheduler": object()}, 1.0)
    assert optimizer.param_groups[0]["lr"] == 0.1
