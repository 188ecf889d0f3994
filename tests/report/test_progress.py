"""A run followed in its growing log: nothing twice, nothing half, nothing that ends the view."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwarden import events
from trainwarden.events import to_dict
from trainwarden.report.progress import NOTABLE_KEPT, Follower, Progress, sentence

AT = "2026-11-20T10:00:00.000+00:00"


def record(event: events.Event, ts: str = AT) -> dict[str, Any]:
    return {"ts": ts, "run_id": "r", **to_dict(event)}


def metrics(step: int, **changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "max_steps": 40,
        "loss": 2.5,
        "grad_norm": None,
        "learning_rate": 1e-4,
        "tokens_per_s": 1234.0,
        "memory_bytes": None,
        "temperature_c": None,
        "steps_skipped": 0,
        "shrinks": 0,
    }
    return record(events.MetricsLogged(step=step, **{**fields, **changes}))


def skipped(step: int, streak: int = 1) -> dict[str, Any]:
    return record(events.StepSkipped(step=step, what="loss", streak=streak))


def after(*records: dict[str, Any]) -> Progress:
    progress = Progress()
    for each in records:
        progress.add(each)
    return progress


FINISHED = events.RunFinished(step=40, status="finished", steps_skipped=0, checkpoint_path=None)
SHRUNK = events.MicroBatchShrunk(step=3, from_size=8, to_size=4, reason="CUDA out of memory")


class TestProgress:
    def test_knows_nothing_at_first(self) -> None:
        progress = Progress()
        assert (progress.history.last_step, progress.max_steps, progress.figure("loss")) == (None, None, None)
        assert progress.counters() == {"skipped": 0, "shrinks": 0}

    def test_has_the_newest_figures(self) -> None:
        progress = after(metrics(10), metrics(20, loss=math.nan))
        assert (progress.history.last_step, progress.max_steps) == (20, 40)
        assert progress.figure("loss") == "nan"
        assert progress.figure("tokens_per_s") == 1234.0

    def test_counts_on_from_the_newest_figures(self) -> None:
        progress = after(skipped(1), metrics(10, steps_skipped=7, shrinks=2), skipped(11), record(SHRUNK))
        assert progress.counters() == {"skipped": 8, "shrinks": 3}

    def test_counts_what_else_the_guard_did_once_it_happened(self) -> None:
        failed = events.CheckpointFailed(step=1, code="RUNTIME_DISK_FULL", reason="full", failures=1)
        assert after(record(failed), record(failed)).counters()["checkpoints failed"] == 2

    def test_remembers_the_newest_checkpoint_and_its_time(self) -> None:
        saved = [events.CheckpointSaved(step=n, path=f"c/step-{n}", save_s=0.1) for n in (5, 10)]
        progress = after(record(saved[0]), record(saved[1], "2026-11-20T10:05:00+00:00"))
        assert (progress.checkpoint_step, progress.checkpoint_at) == (10, "2026-11-20T10:05:00+00:00")
        assert progress.history.checkpoint_path == "c/step-10"

    def test_a_run_that_begins_again_has_not_ended(self) -> None:
        assert after(record(FINISHED)).ended == "finished"
        again = events.RunStarted(step=40, run_id="r", run_dir="d")
        assert after(record(FINISHED), record(again)).ended is None

    def test_keeps_the_last_notable_events_and_of_skips_in_a_row_the_last(self) -> None:
        progress = after(record(SHRUNK), *(skipped(9, streak) for streak in range(1, 10)), metrics(10), skipped(11))
        assert [each["event"] for each in progress.notable] == ["micro_batch_shrunk", "step_skipped"]
        assert "2 in a row" not in sentence(progress.notable[-1])
        many = after(*(record(events.Notice(step=n, text=str(n))) for n in range(20)))
        assert [each["text"] for each in many.notable] == [str(n) for n in range(20 - NOTABLE_KEPT, 20)]

    @given(st.lists(st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.integers()))))
    def test_takes_any_record(self, found: list[dict[str, Any]]) -> None:
        names = ["metrics_logged", "checkpoint_saved", "run_finished", "step_skipped", "other"]
        progress = Progress()
        for number, each in enumerate(found):
            progress.add({**each, "event": names[number % len(names)]})
        assert all(isinstance(sentence(each), str) for each in progress.notable)
        assert progress.figure("loss") is None


class TestASentence:
    @pytest.mark.parametrize(
        "event",
        [
            FINISHED,
            SHRUNK,
            events.Notice(step=1, text="inf"),
            events.CheckpointSaved(step=5, path="c", save_s=0.25),
            events.Evaluated(step=5, loss=math.nan, rows=3),
            events.SensorsSilent(step=5, device=None, reason="hangs"),
        ],
    )
    def test_is_what_the_event_said(self, event: events.Event) -> None:
        assert sentence(json.loads(json.dumps(record(event)))) == str(event)

    @pytest.mark.parametrize(
        ("found", "said"),
        [
            ({"event": "comet_seen", "step": 4}, "comet seen (step 4)"),
            ({"event": "step_skipped", "step": 4}, "step skipped (step 4)"),
            ({"event": "evaluated", "step": 4, "loss": "much", "rows": 2}, "evaluated (step 4)"),
            ({"event": "notice"}, "notice (step unknown)"),
        ],
    )
    def test_of_an_event_that_is_not_known_here_is_its_name(self, found: dict[str, Any], said: str) -> None:
        assert sentence(found) == said


def line(each: dict[str, Any]) -> bytes:
    return json.dumps(each).encode() + b"\n"


class TestAFollower:
    def test_reads_each_line_once_and_only_when_it_is_whole(self, tmp_path: Path) -> None:
        log = tmp_path / "events.jsonl"
        follower = Follower(log)
        assert follower.read_on().history.last_step is None
        whole = line(skipped(2))
        log.write_bytes(line(skipped(1)) + whole[:9])
        assert follower.read_on().skipped == 1
        assert follower.read_on().skipped == 1
        with log.open("ab") as stream:
            stream.write(whole[9:])
        assert follower.read_on().skipped == 2

    @given(cuts=st.lists(st.integers(0, 2000), max_size=8))
    def test_has_the_same_progress_however_the_log_grew(self, tmp_path_factory: Any, cuts: list[int]) -> None:
        log = tmp_path_factory.mktemp("log") / "events.jsonl"
        content = b"".join(map(line, [metrics(1), skipped(2), metrics(3, loss=1.5), record(SHRUNK), record(FINISHED)]))
        follower = Follower(log)
        for cut in sorted(cuts):
            log.write_bytes(content[:cut])
            follower.read_on()
        log.write_bytes(content)
        whole = Follower(log)
        assert follower.read_on() == whole.read_on()

    def test_passes_over_lines_that_are_no_events(self, tmp_path: Path) -> None:
        log = tmp_path / "events.jsonl"
        log.write_bytes(b"{half\n[1]\n{}\n\xff\xfe\n\n" + line(skipped(1)))
        assert Follower(log).read_on().skipped == 1

    def test_begins_again_with_a_log_that_was_replaced_or_removed(self, tmp_path: Path) -> None:
        log = tmp_path / "events.jsonl"
        log.write_bytes(line(skipped(1)) * 3)
        follower = Follower(log)
        assert follower.read_on().skipped == 3
        log.write_bytes(line(skipped(1)))
        assert follower.read_on().skipped == 1
        log.unlink()
        assert follower.read_on().skipped == 0

    def test_says_when_the_log_cannot_be_read_and_keeps_what_it_knows(self, tmp_path: Path) -> None:
        log = tmp_path / "events.jsonl"
        log.write_bytes(line(skipped(1)))
        follower = Follower(log)
        follower.read_on()
        log.unlink()
        log.mkdir()
        assert follower.read_on().skipped == 1
        assert "Is a directory" in follower.problem
