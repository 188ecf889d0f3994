"""What a person sees who watches: every value or the reason there is none, at any width, until the run has ended."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.report.test_progress import FINISHED, SHRUNK, line, metrics, record, skipped
from trainwarden.device import (
    ClocksEventReasons,
    HostMemory,
    Reading,
    RecoveryAction,
    RemappedRows,
    Sample,
    SensorSilent,
    Unknown,
    Unsupported,
    Xid,
    snapshot,
    unreadable,
)
from trainwarden.device.reading import SENSORS
from trainwarden.errors import RunNotFoundError
from trainwarden.events import CheckpointSaved, Notice
from trainwarden.report.watch import View, Watch, console_on, print_view, render
from trainwarden.runs import Ledger, ProcessIdentity, RunDirectory
from trainwarden.testing import FakeDevice, FakeSource, healthy_reading

GIB = 2**30
NOW = datetime(2026, 11, 20, 10, 10, tzinfo=UTC)
HOST = HostMemory(64 * GIB, 48 * GIB, GIB, "machine")
NONE_HERE = Sample(reason="no NVIDIA driver here", taken_at_s=0.0, sequence=1)


def sample(*readings: Reading, **changes: Any) -> Sample:
    return Sample(**{"readings": readings, "taken_at_s": 0.0, "sequence": 1, **changes})


def view(devices: Sample | SensorSilent = NONE_HERE, **changes: Any) -> View:
    fields = {"host": HOST, "disk_path": Path("/data"), "disk_free_bytes": 120 * GIB, "now": NOW}
    return View(devices=devices, **{**fields, **changes})


def shown(what: View, width: int = 120, **options: Any) -> list[str]:
    stream = io.StringIO()
    print_view(Console(file=stream, width=width, highlight=False), what, **options)
    return stream.getvalue().splitlines()


def text_of(what: View, width: int = 160, **options: Any) -> str:
    return "\n".join(shown(what, width, **options))


class TestDevices:
    def test_a_healthy_one_is_one_line(self) -> None:
        header, row, host = shown(view(sample(healthy_reading())))[:3]
        assert header.split() == ["GPU", "NAME", "HEAT", "HEADROOM", "MEMORY", "POWER", "BUSY", "CLOCKS"]
        cells = ["0", "Fake GPU", "60 °C", "27 °C", "40.0/80.0 GiB", "400/700 W", "98 %", "full"]
        assert [cell.strip() for cell in row.split("  ") if cell.strip()] == cells
        assert host == "host  memory 16.0/64.0 GiB  disk 120.00 GiB free at /data"

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"ecc_uncorrected_volatile": 3}, "GPU 0: 3 uncorrectable ECC errors since the driver was loaded"),
            ({"ecc_uncorrected_volatile": 1}, "GPU 0: 1 uncorrectable ECC error since"),
            ({"remapped_rows": RemappedRows(0, 1, False, True)}, "GPU 0: a bad memory row could not be replaced"),
            ({"remapped_rows": RemappedRows(0, 1, True, False)}, "replaced at the next reset"),
            ({"recovery_action": RecoveryAction.decode(1)}, "GPU 0: the driver asks for recovery action gpu_reset"),
            ({"clocks_event_reasons": ClocksEventReasons.decode(0x44)}, "held down by hw_thermal_slowdown, sw_power"),
            ({"headroom_source": "assumed", "headroom_note": "83 °C is assumed"}, "GPU 0: headroom: 83 °C is assumed"),
            ({"memory_source": "host"}, "GPU 0: shares its memory with the host"),
            ({"power_w": Unsupported("not offered", 3)}, "GPU 0: unsupported: power (not offered)"),
            ({"temperature_c": Unknown("timeout")}, "GPU 0: unknown: temperature (timeout)"),
            ({"temperature_c": Unknown("GPU is lost", 15)}, "GPU 0: lost, fallen off the bus"),
            ({"power_w": Unknown("reset required", 16)}, "GPU 0: the driver refuses to read it until it is reset"),
        ],
    )
    def test_what_is_not_as_it_should_be_is_said(self, changes: dict[str, Any], said: str) -> None:
        assert said in text_of(view(sample(healthy_reading(**changes))))

    def test_of_a_healthy_one_no_damage_is_told(self) -> None:
        idle = healthy_reading(clocks_event_reasons=ClocksEventReasons.decode(1), utilization_percent=0)
        assert len(shown(view(sample(idle)))) == len(shown(view(sample(healthy_reading()))))
        assert "idle" in text_of(view(sample(idle)))

    def test_what_is_true_of_several_is_said_once(self) -> None:
        missing = Unsupported("Not Supported", 3)
        readings = [healthy_reading(n, ecc_uncorrected_volatile=missing, remapped_rows=missing) for n in (0, 1, 2, 5)]
        readings[1] = healthy_reading(1)
        lines = [row for row in shown(view(sample(*readings)), 160) if "unsupported" in row]
        assert lines == ["GPU 0, 2, 5: unsupported: ECC errors, remapped rows (Not Supported)"]

    def test_one_of_which_nothing_can_be_read_gives_the_reason_once(self) -> None:
        blind = unreadable(0, "GPU-x", "Fake GPU", Unknown("no permission"), 0.0)
        picture = text_of(view(sample(blind)))
        assert "GPU 0: unknown: everything (no permission)" in picture
        assert picture.count("no permission") == 1

    def test_the_gravest_stands_first(self) -> None:
        held = healthy_reading(0, clocks_event_reasons=ClocksEventReasons.decode(4))
        broken = healthy_reading(1, ecc_uncorrected_volatile=2)
        notes = [row for row in shown(view(sample(held, broken))) if row.startswith("GPU ") and ":" in row]
        assert [note[:5] for note in notes] == ["GPU 1", "GPU 0"]

    def test_xids_are_told_with_what_to_do(self) -> None:
        picture = text_of(view(sample(healthy_reading(), xids=(Xid(1, 79, 0, "u", 0.0), Xid(2, 63, None, None, 0.0)))))
        assert "GPU 0: Xid 79, GPU has fallen off the bus (needed: reboot node)" in picture
        assert "a GPU: Xid 63" in picture

    def test_without_any_there_is_one_line_with_the_reason(self) -> None:
        assert shown(view())[0] == "no GPU: no NVIDIA driver here"

    def test_before_the_first_answer_nothing_is_claimed(self) -> None:
        assert shown(view(Sample(reason="no sample was taken yet", taken_at_s=0.0)))[0] == "reading the devices …"

    def test_silence_is_said_and_the_last_reading_shown_as_old(self) -> None:
        last = sample(healthy_reading())
        first, _, row = shown(view(SensorSilent(7.3, "nvmlDeviceGetTemperature", last)), 160)[:3]
        assert first.startswith("GPUs: unknown, no reading for 7.3 s: nvmlDeviceGetTemperature has not returned")
        assert "says nothing about now" in first
        assert "60 °C" in row
        assert shown(view(SensorSilent(7.3, None, replace(last, readings=()))))[0] == (
            "GPUs: unknown, no reading for 7.3 s"
        )

    def test_on_80_columns_only_the_name_is_cut(self) -> None:
        reading = healthy_reading(
            name="NVIDIA RTX PRO 6000 Blackwell Server Edition",
            memory_used_bytes=141 * GIB,
            memory_total_bytes=141 * GIB,
            power_w=1000.0,
            power_limit_w=1000.0,
        )
        row = shown(view(sample(reading)), 80)[1]
        assert len(row) <= 80
        assert "RTX PRO" in row
        assert row.count("…") == 1
        for cell in ("141.0/141.0 GiB", "1000/1000 W", "98 %", "full"):
            assert cell in row

    def test_names_cannot_steer_the_terminal(self) -> None:
        picture = text_of(view(sample(healthy_reading(name="evil\x1b[2J\n\x07GPU"), reason="a\x1b]0;b")))
        assert "\x1b" not in picture
        assert "evil [2J GPU" in picture

    @given(st.dictionaries(st.sampled_from(SENSORS), st.sampled_from([Unsupported("u"), Unknown("k", 15)])))
    def test_any_sensor_may_be_missing(self, missing: dict[str, Any]) -> None:
        picture = view(sample(healthy_reading(0, **missing), healthy_reading(1)))
        for width in (40, 80, 120):
            assert shown(picture, width)
        json.dumps(picture.to_dict(), allow_nan=False)


class TestTheHost:
    def test_a_limit_of_a_container_is_named(self) -> None:
        assert "16.0/64.0 GiB of its cgroup" in text_of(view(host=replace(HOST, limit_source="cgroup")))

    def test_a_disk_that_cannot_be_asked_is_unknown(self) -> None:
        assert "disk unknown (no such device)" in text_of(view(disk_free_bytes=Unknown("no such device")))


def written(directory: Path, *records: dict[str, Any]) -> None:
    with (directory / "events.jsonl").open("ab") as stream:
        stream.writelines(map(line, records))


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run of this very process, which lives."""
    directory = RunDirectory.open(tmp_path / "demo", command=["python", "train.py"])
    Ledger().started(run_id=directory.run_id, path=directory.path, command=["python", "train.py"])
    return directory


def watching(run: RunDirectory | None, **changes: Any) -> Watch:
    settings: dict[str, Any] = {"clock": lambda: NOW, **changes}
    return Watch(lambda: NONE_HERE, Ledger(), run.run_id if run else None, **settings)


def seen(run: RunDirectory | None, **options: Any) -> str:
    return text_of(watching(run).look(), **options)


class TestARun:
    def test_is_shown_with_all_that_is_known(self, run: RunDirectory) -> None:
        saved = CheckpointSaved(step=20, path=str(run.path / "checkpoints/step-00000020"), save_s=0.1)
        written(run.path, metrics(10), record(SHRUNK), record(saved), metrics(30, loss=1.25, shrinks=1))
        picture = seen(run)
        for words in (
            f"run {run.run_id}  running  process ",
            str(run.path),
            "step 30/40 (75 %)  (last event 10 min 00 s ago)",
            "loss        1.2500  █▁",
            "1,234 tokens/s",
            "of step 20, written and verified 10 min 00 s ago  (step-00000020)",
            "skipped 0  shrinks 1",
            "10 min 00 s ago  " + str(SHRUNK),
            "free for the run",
        ):
            assert words in picture

    def test_that_has_said_nothing_yet_is_unknown_not_zero(self, run: RunDirectory) -> None:
        lines = [row.split(maxsplit=1) for row in seen(run).splitlines()]
        assert ["step", "unknown"] in lines
        assert ["checkpoint", "none yet"] in lines
        assert not any(row[:1] == ["loss"] for row in lines)

    def test_shows_nan_as_nan(self, run: RunDirectory) -> None:
        written(run.path, metrics(10), metrics(20, loss=math.nan))
        assert "loss        NaN  ▁×" in seen(run)
        assert "loss        NaN  _x" in seen(run, unicode=False)
        assert watching(run).look().to_dict()["run"]["loss"] == "nan"

    def test_has_its_newest_events_first_and_on_a_clean_line(self, run: RunDirectory) -> None:
        written(run.path, skipped(1), record(Notice(step=2, text="[red]odd\x1b[2J\nword")))
        picture = seen(run)
        assert picture.index("[red]odd [2J word") < picture.index("step 1 skipped")
        assert "\x1b" not in picture

    def test_whose_process_is_gone_is_lost(self, run: RunDirectory) -> None:
        here = ProcessIdentity.current()
        gone = replace(here, start="another boot")
        Ledger().started(run_id=run.run_id, path=run.path, command=["x"], process=gone)
        view = watching(run).look()
        assert view.over
        assert "lost (its process is gone without a word)" in text_of(view)

    def test_of_another_machine_ends_by_its_own_word(self, run: RunDirectory) -> None:
        far = replace(ProcessIdentity.current(), host="far away")
        Ledger().started(run_id=run.run_id, path=run.path, command=["x"], process=far)
        watch = watching(run)
        assert "unknown (it runs, or ran, on another machine)" in text_of(watch.look())
        assert not watch.look().over
        written(run.path, record(FINISHED))
        assert watch.look().over

    def test_that_the_ledger_does_not_have_is_found_by_its_directory(
        self, run: RunDirectory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        written(run.path, metrics(10))
        monkeypatch.setenv("WARDEN_HOME", str(tmp_path / "empty"))
        watch = Watch(lambda: NONE_HERE, Ledger(), str(run.path), clock=lambda: NOW)
        picture = text_of(watch.look())
        assert f"run {run.run_id}  unknown (not in the ledger)" in picture
        assert "step 10/40" in picture

    def test_that_failed_tells_the_code_and_the_ledgers_figures(self, run: RunDirectory) -> None:
        written(run.path, metrics(10))
        Ledger().finished(
            run.run_id,
            status="failed",
            steps_completed=13,
            steps_skipped=3,
            final_loss=math.nan,
            code="RUNTIME_NAN_LOSS",
        )
        picture = seen(run)
        for words in ("failed", "warden explain RUNTIME_NAN_LOSS", "step 13/40", "skipped 3", "loss        NaN"):
            assert words in picture

    def test_that_nobody_knows_is_an_error_with_the_known_ones(self, run: RunDirectory) -> None:
        with pytest.raises(RunNotFoundError) as raised:
            Watch(lambda: NONE_HERE, Ledger(), "nope")
        assert raised.value.details["known"] == [run.run_id]

    def test_keeps_its_last_state_while_the_ledger_cannot_be_read(self, run: RunDirectory) -> None:
        watch = watching(run)
        written(run.path, metrics(10))
        Ledger().path.write_bytes(b"no database at all, but long enough to be looked at" * 20)
        picture = text_of(watch.look())
        assert "step 10/40" in picture
        assert "runs: " in picture

    @pytest.mark.parametrize("width", [30, 80, 200])
    def test_fits_the_width(self, run: RunDirectory, width: int) -> None:
        written(run.path, *(metrics(n, loss=40.0 - n) for n in range(1, 41)), record(SHRUNK))
        assert max(map(len, shown(watching(run).look(), width))) <= width


class TestWithoutARun:
    def test_the_running_ones_are_listed_in_a_line_each(self, run: RunDirectory, tmp_path: Path) -> None:
        written(run.path, metrics(10))
        other = RunDirectory.open(tmp_path / "other", command=["x"])
        Ledger().started(run_id=other.run_id, path=other.path, command=["x"])
        done = RunDirectory.open(tmp_path / "done", command=["x"])
        Ledger().started(run_id=done.run_id, path=done.path, command=["x"])
        Ledger().finished(done.run_id, status="finished")
        lines = seen(None, width=200).splitlines()
        listed = lines[lines.index("running") + 1 :]
        assert sorted(row.split()[-1] for row in listed) == sorted([str(run.path), str(other.path)])
        assert any(re.search(r"step 10/40 +loss 2.5000  1,234 tokens/s", row) for row in listed)

    def test_a_long_path_shows_its_end(self, run: RunDirectory) -> None:
        last = seen(None, width=50).splitlines()[-1]
        assert len(last) <= 50
        assert last.endswith("/demo")

    def test_it_is_said_that_none_is_running(self) -> None:
        assert seen(None).splitlines()[-1] == "no run is running"
        assert not watching(None).look().over

    def test_a_damaged_ledger_does_not_hide_the_devices(self) -> None:
        Ledger().path.write_bytes(b"no database at all, but long enough to be looked at" * 20)
        picture = text_of(watching(None).look())
        assert picture.startswith("no GPU: no NVIDIA driver here")
        assert "runs: " in picture


class TestAsADocument:
    def test_it_is_all_of_the_view(self, run: RunDirectory) -> None:
        written(run.path, metrics(10), skipped(11))
        watch = Watch(lambda: snapshot(FakeSource(FakeDevice(power_w=Unknown("x")))), Ledger(), run.run_id)
        document = json.loads(json.dumps(watch.look().to_dict(), allow_nan=False))
        assert document["devices"][0]["temperature_c"] == 60.0
        assert document["devices"][0]["power_w"] == {"unknown": "x"}
        assert document["silence"] is None
        told = document["run"]
        assert (told["status"], told["step"], told["max_steps"], told["tokens_per_s"]) == ("running", 11, 40, 1234.0)
        assert told["counters"] == {"skipped": 1, "shrinks": 0}
        assert told["events"][0]["sentence"].startswith("step 11 skipped")

    def test_readings_of_a_silent_sensor_are_not_among_the_devices(self) -> None:
        document = view(SensorSilent(7.0, "nvmlInit", sample(healthy_reading()))).to_dict()
        assert document["devices"] == []
        assert document["silence"]["call"] == "nvmlInit"
        assert len(document["silence"]["last_devices"]) == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def asleep(*then: Callable[[], None]) -> tuple[Callable[[float], None], list[float]]:
    """A sleep that lets the world change instead of waiting, and the list of how long it should have been."""
    slept: list[float] = []
    changes = iter(then)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        next(changes)()

    return sleep, slept


def interrupt() -> None:
    raise KeyboardInterrupt


class TestTheLiveView:
    def test_is_drawn_each_second_until_the_run_has_ended(self, run: RunDirectory) -> None:
        sleep, slept = asleep(
            lambda: written(run.path, metrics(10)),
            lambda: Ledger().finished(run.run_id, status="finished", steps_completed=40),
        )
        stream = Terminal()
        watching(run, sleep=sleep).show(Console(file=stream, force_terminal=True, width=100, height=40))
        assert slept == [1.0, 1.0]
        pictures = stream.getvalue()
        assert pictures.index("step 10/40") < pictures.index("step 40/40")
        assert pictures.count("\x1b[?1049h") == pictures.count("\x1b[?1049l") == 1
        left = pictures.partition("\x1b[?1049l")[2]
        assert "finished" in left
        assert "Ctrl-C" not in left

    def test_of_an_ended_run_is_drawn_once(self, run: RunDirectory) -> None:
        Ledger().finished(run.run_id, status="stopped")
        sleep, slept = asleep()
        watching(run, sleep=sleep).show(Console(file=Terminal(), force_terminal=True))
        assert slept == []

    def test_ends_quietly_on_an_interrupt_and_leaves_the_last_view(self) -> None:
        sleep, _ = asleep(interrupt)
        stream = Terminal()
        watching(None, sleep=sleep).show(Console(file=stream, force_terminal=True, width=100, height=40))
        assert "no run is running" in stream.getvalue().partition("\x1b[?1049l")[2]

    def test_looks_again_soon_while_the_devices_have_not_answered(self) -> None:
        answers = iter([Sample(reason="no sample was taken yet", taken_at_s=0.0), NONE_HERE])
        sleep, slept = asleep(lambda: None, interrupt)
        watch = Watch(lambda: next(answers), Ledger(), sleep=sleep, clock=lambda: NOW)
        watch.show(Console(file=Terminal(), force_terminal=True))
        assert slept == [0.1, 1.0]


class TestTheConsole:
    def test_off_a_terminal_is_plain_and_wide(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("COLUMNS", raising=False)
        monkeypatch.setenv("FORCE_COLOR", "1")
        stream = io.StringIO()
        console = console_on(stream)
        print_view(console, view(sample(healthy_reading(ecc_uncorrected_volatile=1))))
        assert console.width == 120
        assert "\x1b" not in stream.getvalue()
        assert all(row == row.rstrip() for row in stream.getvalue().splitlines())

    @pytest.mark.parametrize(("setting", "coloured"), [("", True), ("1", False)])
    def test_on_a_terminal_has_colours_unless_they_are_not_wanted(
        self, monkeypatch: pytest.MonkeyPatch, setting: str, coloured: bool
    ) -> None:
        monkeypatch.setenv("NO_COLOR", setting)
        monkeypatch.setenv("TERM", "xterm")
        stream = Terminal()
        print_view(console_on(stream), view(sample(healthy_reading(ecc_uncorrected_volatile=1))))
        assert ("31m" in stream.getvalue()) is coloured


def test_a_clock_that_is_behind_gives_no_negative_age(run: RunDirectory) -> None:
    early = Watch(lambda: NONE_HERE, Ledger(), run.run_id, clock=lambda: NOW - timedelta(days=900))
    written(run.path, metrics(10))
    assert "last event 0 s ago" in text_of(early.look())


def test_rendering_changes_nothing(run: RunDirectory) -> None:
    written(run.path, metrics(10), skipped(11))
    once = watching(run).look()
    assert shown(once) == shown(once)
    assert render(once, width=80) is not None
