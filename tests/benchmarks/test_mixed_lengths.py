"""The stream of mixed lengths measures what its docstring says; a short stream runs under a real memory limit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mixed_lengths
import pytest
import torch
from mixed_lengths import ACCELERATE, FIXED, GUARD, IGNORED, PAD, ROWS, Candidate, Record

from trainwarden.testing import out_of_memory_error


@pytest.fixture(scope="module")
def short_run() -> Record:
    """The Guard on 12 batches, in a process whose address space is limited."""
    return mixed_lengths.run_in_child(Record(GUARD, batches=12, seed=0))


def test_the_guard_trains_every_sample_under_a_real_limit(short_run: Record) -> None:
    assert short_run.survived
    assert short_run.ooms_at, "the limit must have bitten"
    assert short_run.optimizer_steps == 12
    assert short_run.last_step_samples == ROWS
    assert short_run.attempts == [ROWS]
    assert short_run.samples_run >= short_run.samples_due == 12 * ROWS


def test_long_batches_are_split_and_short_ones_are_not(short_run: Record) -> None:
    tokens = {batch: rows * length for batch, rows, length in short_run.passes}
    late = {batch: t for batch, t in tokens.items() if batch > max(short_run.ooms_at)}
    assert late
    assert max(late.values()) < max(rows * length for _, rows, length in short_run.passes)


def record(contestant: str, **facts: object) -> Record:
    base = Record(contestant, 100, 0, optimizer_steps=100, last_step_samples=ROWS, cpu_s=10.0, wall_s=20.0)
    return replace(base, survived=True, attempts=[ROWS], samples_run=1600, batches_begun=100, **facts)  # type: ignore[arg-type]


OURS = record(GUARD, ooms_at=[1, 4, 60], passes=[(1, 16, 90), (1, 8, 90), (1, 8, 90), (2, 16, 50)])
REFERENCE = record(FIXED, micro_batch_size=4)


def test_the_promise_is_kept_by_one_late_error_and_nearly_the_best_throughput() -> None:
    assert mixed_lengths.holds([OURS, REFERENCE])
    assert mixed_lengths.late_ooms(OURS) == 1


@pytest.mark.parametrize(
    "broken",
    [
        replace(OURS, ooms_at=[1, 60, 61]),
        replace(OURS, ooms_at=[]),
        replace(OURS, cpu_s=11.2),
        replace(OURS, optimizer_steps=99),
        replace(OURS, last_step_samples=8),
        replace(OURS, survived=False),
    ],
    ids=["two late errors", "no limit at all", "slow", "a step too few", "a smaller batch", "died"],
)
def test_the_promise_is_broken_by(broken: Record) -> None:
    assert not mixed_lengths.holds([broken, REFERENCE])


def test_throughput_counts_the_samples_due_and_not_those_run_again() -> None:
    wasteful = replace(OURS, cpu_s=20.0, samples_run=3200)
    assert mixed_lengths.throughput_ratio(wasteful, REFERENCE) == pytest.approx(0.5)


def test_of_several_runs_the_most_errors_and_the_quickest_time_count() -> None:
    quick, bad = replace(OURS, ooms_at=[1], cpu_s=9.0, wall_s=11.0), replace(OURS, ooms_at=[1, 40, 41], cpu_s=12.0)
    found = mixed_lengths.typical([quick, bad])
    assert (found.ooms_at, found.cpu_s, found.wall_s) == ([1, 40, 41], 9.0, 11.0)
    assert not mixed_lengths.typical([quick, replace(bad, survived=False)]).survived


def test_the_best_fixed_micro_batch_is_the_quickest_that_survives() -> None:
    found = [Candidate(1, True, 9.0), Candidate(2, True, 5.0), Candidate(3, True, 6.0), Candidate(4, False, None)]
    assert mixed_lengths.best_fixed(found) == [2, 3, 1]


def test_the_table_shows_restarts() -> None:
    restarted = record(ACCELERATE, ooms_at=[3, 30])
    restarted = replace(restarted, attempts=[16, 14, 12], last_step_samples=12, samples_run=2400)
    lines = mixed_lengths.table([OURS, REFERENCE, restarted]).splitlines()
    assert "best fixed micro-batch (4)" in lines[3]
    assert "16 → 14 → 12" in lines[4]
    assert "1.500" in lines[4]


def test_rows_are_padded_and_padding_has_no_label() -> None:
    batch = mixed_lengths.collate([torch.tensor([5, 6, 7, 8]), torch.tensor([1, 2])])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [1, PAD, PAD]]
    assert batch["labels"].tolist() == [[6, 7, 8], [2, IGNORED, IGNORED]]


def test_the_stream_is_mostly_short_and_reaches_the_longest() -> None:
    lengths = [len(row) - 1 for row in mixed_lengths.Texts(2000, seed=0).rows]
    assert max(lengths) == mixed_lengths.LONGEST
    assert sorted(lengths)[1000] < mixed_lengths.LONGEST / 3


def test_errors_are_counted_where_they_are_thrown_and_others_are_not() -> None:
    written = Record(GUARD, 1, 0, batches_begun=7)
    with pytest.raises(torch.OutOfMemoryError), written.counting():
        raise out_of_memory_error()
    with pytest.raises(KeyError), written.counting():
        raise KeyError
    assert written.ooms_at == [7]


def test_a_plot_is_drawn_where_matplotlib_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    mixed_lengths.plot([OURS, REFERENCE], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
