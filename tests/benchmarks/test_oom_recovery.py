"""The comparison of out-of-memory recoveries measures what its docstring says."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import oom_recovery
import pytest
import torch
from oom_recovery import Outcome, Record

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' own warnings are not ours to fix

REFERENCE_RATES = [1e-2 * (1 - step / 10) for step in range(10)]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Outcome]]:
    from transformers import Trainer  # noqa: F401 - so that its many objects are there to be frozen

    # accelerate collects garbage at every restart: half a second each time with transformers loaded.
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WARDEN_HOME", str(tmp_path_factory.mktemp("home")))
        # pytest's own stream would bypass the file descriptors that the benchmark listens to.
        patch.setattr(sys, "stderr", open(2, "w", closefd=False))  # noqa: SIM115 - a descriptor, not a path
        yield oom_recovery.compare(seed=0)
    gc.unfreeze()


def of(outcomes: list[Outcome], contestant: str, fault: str = "attempt") -> Outcome:
    return next(o for o in outcomes if o.contestant == contestant and o.fault == fault)


def test_the_undisturbed_run_is_ten_steps_of_eight(outcomes: list[Outcome]) -> None:
    undisturbed = of(outcomes, "undisturbed", "none")
    assert (undisturbed.run, undisturbed.trained, undisturbed.optimizer_steps) == (80, 80, 10)
    assert undisturbed.learning_rates == pytest.approx(REFERENCE_RATES)


def test_without_the_fault_every_contestant_trains_exactly_the_same(outcomes: list[Outcome]) -> None:
    assert {o.control_distance for o in outcomes} == {0.0}


@pytest.mark.parametrize("fault", ["attempt", "process"])
def test_the_guard_runs_eight_rows_again_and_ends_where_the_undisturbed_run_does(
    outcomes: list[Outcome], fault: str
) -> None:
    ours = of(outcomes, "trainwarden Guard", fault)
    assert (ours.run, ours.trained, ours.effective_batch, ours.optimizer_steps) == (88, 80, 8, 10)
    assert ours.schedule_kept
    assert ours.distance < 1e-5
    assert 0 < ours.checked <= 24  # the check before the first split: whole batch and halves, without gradients
    assert any("micro-batch 8 -> 4" in line for line in ours.announced)


@pytest.mark.parametrize(
    "contestant", ["accelerate, built outside", "accelerate, built inside", "transformers, 1 epoch"]
)
def test_peers_start_over_four_times_in_silence(outcomes: list[Outcome], contestant: str) -> None:
    peer = of(outcomes, contestant)
    assert peer.attempts == [8, 7, 6, 5, 4]
    assert (peer.trained, peer.run) == (236, 262)
    assert (peer.effective_batch, peer.schedule_kept, peer.announced) == (4, False, [])
    assert peer.distance > 1e-3


def test_the_kinder_fault_strikes_the_first_batch_of_each_later_attempt(outcomes: list[Outcome]) -> None:
    peer = of(outcomes, "transformers, 1 epoch", "process")
    assert peer.trained == 6 * 8 + 80
    assert peer.run == peer.trained + 8 + 7 + 6 + 5


def test_the_promise_is_broken_by_a_distance_a_silence_or_a_restart(outcomes: list[Outcome]) -> None:
    assert oom_recovery.holds(outcomes)
    ours = of(outcomes, "trainwarden Guard")
    for broken in (
        replace(ours, distance=1e-4),
        replace(ours, announced=[]),
        replace(ours, run=96),
        replace(ours, schedule_kept=False),
    ):
        assert not oom_recovery.holds([broken])


def test_the_table_shows_the_undisturbed_run_and_one_fault(outcomes: list[Outcome]) -> None:
    lines = oom_recovery.table(outcomes, "attempt").splitlines()
    assert len(lines) == 2 + 1 + len(oom_recovery.CONTESTANTS)
    assert "88 of 80" in lines[3]


def test_a_plot_is_drawn_where_matplotlib_is_installed(outcomes: list[Outcome], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    oom_recovery.plot(outcomes, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_outcomes_go_into_json(outcomes: list[Outcome]) -> None:
    assert json.loads(json.dumps([oom_recovery.asdict(o) for o in outcomes]))


def test_the_memory_ceiling_counts_from_the_attempt_or_from_the_process() -> None:
    batch = {"inputs": torch.zeros(8, oom_recovery.WIDTH), "targets": torch.zeros(8, 1)}
    model = oom_recovery.Network(0)
    for fault, fits in (("attempt", True), ("process", False)):
        record = Record(0, fault)
        compute_loss = record.limited(model)
        record.learning_rates = [1e-2] * 6  # six steps in earlier attempts
        record.begin_attempt(8)
        if fits:
            compute_loss(batch)
        else:
            with pytest.raises(torch.OutOfMemoryError):
                compute_loss(batch)


def test_output_is_captured_whichever_way_it_is_written() -> None:
    with oom_recovery.captured_output() as lines:
        print("printed")
        os.write(2, b"written below Python\n")
        print("on stderr", file=sys.stderr)
    assert "written below Python" in lines
