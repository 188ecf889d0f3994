"""What a person sees during a run: a bar on a terminal, plain lines anywhere else, nothing on stdout."""

from __future__ import annotations

import io
import math
import os
import pty
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import ended_when_hung
from trainwarden.events import (
    CheckpointSaved,
    Evaluated,
    MetricsLogged,
    MicroBatchShrunk,
    Notice,
    Resumed,
    RunFinished,
    RunStarted,
    StepCompleted,
    StepSkipped,
)
from trainwarden.report.console import Console

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def metrics(step: int, **changes: Any) -> MetricsLogged:
    fields: dict[str, Any] = {
        "max_steps": 40,
        "loss": 2.5,
        "grad_norm": 1.25,
        "learning_rate": 1e-4,
        "tokens_per_s": 1234.0,
        "memory_bytes": 3 * 2**29,
        "temperature_c": None,
        "steps_skipped": 0,
        "shrinks": 0,
    }
    return MetricsLogged(step=step, **{**fields, **changes})


SKIPPED = StepSkipped(step=3, what="loss", streak=1)
SHRUNK = MicroBatchShrunk(step=3, from_size=8, to_size=4, reason="CUDA out of memory")
FINISHED = RunFinished(step=40, status="finished", steps_skipped=0, checkpoint_path=None)


def plain(*events: Any) -> list[str]:
    stream = io.StringIO()
    console = Console(stream)
    for event in events:
        console(event)
    console.close()
    return stream.getvalue().splitlines()


def drawn(*events: Any) -> str:
    """The last picture on the terminal and all lines above it, without colours."""
    stream = io.StringIO()
    console = Console(stream, live=True)
    for event in events:
        console(event)
    console.close()
    return ESCAPE.sub("", stream.getvalue())


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_away_from_a_terminal_each_log_step_is_one_line() -> None:
    lines = plain(metrics(10), StepCompleted(step=11, epoch=0, step_s=0.1), metrics(20, loss=math.nan))
    assert lines == [str(metrics(10)), str(metrics(20, loss=math.nan))]
    assert "loss nan" in lines[1]


def test_notices_carry_the_name_of_who_speaks() -> None:
    lines = plain(Notice(step=0, text="computes in bfloat16"), SKIPPED, Evaluated(step=3, loss=1.0, rows=2))
    assert lines[0] == "warden: computes in bfloat16"
    assert lines[1].startswith("warden: step 3 skipped")
    assert lines[2].startswith("evaluation after step 3")


def test_the_start_and_every_checkpoint_are_told() -> None:
    lines = plain(
        RunStarted(step=0, run_id="r", run_dir="runs/a"),
        CheckpointSaved(step=5, path="c", save_s=0.1),
        FINISHED,
    )
    assert [line.split()[0] for line in lines] == ["run", "checkpoint", "run"]


def test_rich_is_not_imported_without_a_terminal() -> None:
    code = """
        import sys
        from trainwarden.report.console import Console
        from trainwarden.events import Notice
        Console()(Notice(step=0, text="x"))
        print([name for name in sys.modules if name == "rich" or name == "torch"])
    """
    answer = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
    assert answer.stderr == "warden: x\n"


def test_the_bar_has_the_newest_figures() -> None:
    picture = drawn(metrics(10), metrics(20, loss=2.25, temperature_c=61.4)).splitlines()[-1]
    for figure in ("20/40", "loss 2.2500", "grad 1.25", "1234 tok/s", "1.50 GiB", "61 °C"):
        assert figure in picture
    assert "skips" not in picture


def test_the_bar_shows_nan_and_unknown_as_such() -> None:
    picture = drawn(metrics(10, loss=math.nan, grad_norm=None, memory_bytes=None)).splitlines()[-1]
    assert "loss NaN" in picture
    assert "grad unknown" in picture
    assert "memory unknown" in picture


def test_the_bar_counts_what_the_guard_did_at_once_and_keeps_to_its_figures() -> None:
    picture = drawn(metrics(2), SKIPPED, SHRUNK).splitlines()[-1]
    assert "skips 1 · shrinks 1" in picture
    picture = drawn(metrics(2), SKIPPED, metrics(10, steps_skipped=1, shrinks=2)).splitlines()[-1]
    assert "skips 1 · shrinks 2" in picture


def test_steps_move_the_bar_between_log_lines() -> None:
    assert "12/40" in drawn(metrics(10), *(StepCompleted(step=n, epoch=0, step_s=0.1) for n in (11, 12)))


def test_a_loop_of_ones_own_that_logs_nothing_has_a_bar_that_counts() -> None:
    assert "7/?" in drawn(StepCompleted(step=7, epoch=0, step_s=0.1))


def test_notices_stand_above_the_bar_and_log_lines_do_not() -> None:
    picture = drawn(metrics(10), Notice(step=10, text="[a] choice: 1/2"), metrics(20))
    assert "warden: [a] choice: 1/2\n" in picture
    assert "lr 1.00e-04" not in picture
    assert picture.rstrip().splitlines()[-1].startswith("training")


def test_the_end_of_the_run_ends_the_bar() -> None:
    picture = drawn(metrics(40), FINISHED, Notice(step=40, text="after"))
    last_lines = picture.rstrip().splitlines()[-2:]
    assert last_lines == ["run finished after 40 steps (0 skipped)", "warden: after"]


def test_a_resumed_run_reckons_the_time_that_is_left_from_where_it_resumed() -> None:
    stream = io.StringIO()
    console = Console(stream, live=True)
    console(Resumed(step=39, run_id="r", checkpoint_path="c", epoch=0, batch_index=0))
    console(metrics(39))
    bar = console._bar
    assert bar is not None
    [task] = bar._progress.tasks
    assert task.completed == 39
    assert task.speed is None  # 39 steps were not made just now
    console.close()


def test_closing_twice_is_harmless() -> None:
    with Console(io.StringIO(), live=True) as console:
        console(metrics(1))
        console.close()


ON_A_TERMINAL = """
    import sys
    from tests.report.test_console import metrics, SKIPPED, FINISHED
    from trainwarden.report.console import Console
    console = Console()
    console(metrics(10)); console(SKIPPED); console(metrics(20)); console(FINISHED)
    print("data")
"""


def on_a_terminal(**environ: str) -> tuple[str, str]:
    """What a process says to a real terminal on stderr, and what to a pipe on stdout."""
    master, slave = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(ON_A_TERMINAL)],
            stdout=subprocess.PIPE,
            stderr=slave,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "TERM": "xterm", "COLUMNS": "200", **environ},
        )
        os.close(slave)
        seen = b""
        try:
            with ended_when_hung(process.kill):
                while chunk := os.read(master, 4096):
                    seen += chunk
        except OSError:  # how Linux reports that the other end was closed
            pass
        out, _ = process.communicate()
    finally:
        os.close(master)
    return seen.decode(), out


def test_on_a_real_terminal_there_is_a_coloured_bar_and_stdout_stays_clean() -> None:
    seen, out = on_a_terminal()
    assert out == "data\n"
    assert "\x1b[?25h" in seen  # the cursor is given back
    assert re.search(r"\x1b\[[0-9;]*3[0-9]", seen)
    assert "40/40" in ESCAPE.sub("", seen)


def test_no_color_is_honoured() -> None:
    seen, _ = on_a_terminal(NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", seen)
    assert "40/40" in ESCAPE.sub("", seen)


def test_a_terminal_that_cannot_move_its_cursor_gets_lines() -> None:
    seen, _ = on_a_terminal(TERM="dumb")
    assert "\x1b" not in seen
    assert str(metrics(20)) in seen.replace("\r\n", "\n")
