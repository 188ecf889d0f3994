"""The campaign benchmark trains what it says on real text, and its verdict is that of its table."""

from __future__ import annotations

from pathlib import Path

import pytest
import slao_campaign
from slao_campaign import BASE, PAPER, SEQUENTIAL, TASKS


def run_of(kept: float, sequential: float) -> dict[str, list[dict[str, float]]]:
    def stages(last: float) -> list[dict[str, float]]:
        return [dict.fromkeys(TASKS, 5.0), dict.fromkeys(TASKS, 5.5), dict.fromkeys(TASKS, last)]

    others = {name: stages(6.0) for name in (BASE, *slao_campaign.MERGES)}
    return {**others, PAPER: stages(kept), SEQUENTIAL: stages(sequential)}


def test_the_data_sets_are_there_without_a_network_and_large_enough() -> None:
    for name, texts in TASKS.items():
        rows = list(texts())
        assert len(rows) >= slao_campaign.ROWS, name
        assert len(set(rows)) > 0.9 * len(rows), name
        assert all(len(row) <= slao_campaign.CHARACTERS for row in rows)


def test_the_promise_is_kept_only_when_every_seed_keeps_it() -> None:
    assert slao_campaign.holds([run_of(5.8, 6.1), run_of(5.9, 6.0)])
    assert not slao_campaign.holds([run_of(5.8, 6.1), run_of(6.0, 6.0)])


def test_what_was_forgotten_is_the_rise_of_the_first_tasks_loss() -> None:
    run = run_of(5.8, 6.1)
    assert slao_campaign.forgotten(run[PAPER]) == pytest.approx(0.8)
    cells = slao_campaign.row(SEQUENTIAL, [run, run_of(5.8, 6.3)])
    assert cells == [SEQUENTIAL, "5.000", "5.500", *["6.200"] * 3, "6.200", "+1.200 (+1.100 … +1.300)"]


def test_a_short_campaign_has_a_loss_of_every_contestant_on_every_task_after_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slao_campaign, "HELD_OUT", 2)
    monkeypatch.setattr(slao_campaign, "MERGES", {PAPER: slao_campaign.MERGES[PAPER]})
    slao_campaign.write_data(tmp_path, rows=6)
    few = ("trainer.max_steps=1", "trainer.warmup_steps=0", "data.limit=60", "data.eval_rows=1", "trainer.batch_size=2")
    base = slao_campaign.train_base(tmp_path, 0, *few, "trainer.eval_every_steps=0")
    run = slao_campaign.measure(tmp_path, base, 0, max_steps=1, warmup_steps=0, batch_size=2)
    assert list(run) == [BASE, *slao_campaign.MERGES, SEQUENTIAL]
    for stages in run.values():
        assert [set(losses) for losses in stages] == [set(TASKS)] * 3
    assert run[SEQUENTIAL][0] == run[PAPER][0], "the first training is one and the same"
    assert len(slao_campaign.table([run]).splitlines()) == 5
