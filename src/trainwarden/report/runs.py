"""The list of runs and the page of one, as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from trainwarden.report import text
from trainwarden.report.history import INTERVENTIONS, History, marks, sparkline
from trainwarden.runs import RunManifest, RunRecord

_RIGHT = frozenset({"STEPS", "SKIPPED", "SHRINKS", "LEFT-OUT", "LOSS", "EXIT"})


def runs_table(records: Sequence[RunRecord]) -> str:
    """One line a run, in the order given. ``LEFT-OUT``: samples and batches that could not be loaded."""
    headers = ("RUN", "STATUS", "STARTED (UTC)", "STEPS", "SKIPPED", "SHRINKS", "LEFT-OUT", "LOSS", "EXIT", "DIRECTORY")
    return text.table(headers, [_row(record) for record in records], _RIGHT)


def _row(record: RunRecord) -> tuple[str, ...]:
    return (
        record.run_id,
        record.status,
        _moment(record.started_at),
        _brief(record.steps_completed),
        _brief(record.steps_skipped),
        _brief(record.shrinks),
        _brief(record.data_skipped),
        "-" if record.final_loss is None else text.number(record.final_loss),
        _brief(record.exit_code),
        record.path,
    )


def run_page(
    record: RunRecord | None,
    manifest: RunManifest | None,
    history: History,
    *,
    path: str,
    resume_command: str | None,
    unicode: bool = True,
    width: int = 60,
) -> str:
    """Everything that is known of a run, with its loss as a line of bars and what the guard did marked below.

    Args:
        record: its row in the ledger, if it has one.
        manifest: its ``run.json``, if that can still be read.
        history: its event log.
        path: its directory.
        resume_command: how to continue it; ``None`` where there is nothing to continue.
        unicode: whether block characters can be shown.
        width: columns of the curve.
    """
    rows = [
        ("run", record.run_id if record else manifest.run_id if manifest else text.UNKNOWN),
        ("status", record.status if record else f"{text.UNKNOWN} (not in the ledger)"),
        ("directory", path),
        *_outcome(record, history),
        *_origin(record, manifest),
    ]
    if resume_command is not None:
        rows.append(("resume with", resume_command))
    page = text.pairs(rows)
    curve = _curve(history, unicode=unicode, width=width)
    return f"{page}\n\n{curve}" if curve else page


def _outcome(record: RunRecord | None, history: History) -> list[tuple[str, str]]:
    if record is not None and record.steps_completed is not None:
        steps = text.count(record.steps_completed)
    elif history.last_step is not None:
        steps = f"{text.UNKNOWN} ({history.last_step:,} at the last event)"
    else:
        steps = text.UNKNOWN
    checkpoint = (record.checkpoint_path if record else None) or history.checkpoint_path
    rows = [
        ("steps", steps),
        ("skipped", text.count(record.steps_skipped if record else None)),
        ("shrinks", text.count(record.shrinks if record else None)),
        ("left out", text.count(record.data_skipped if record else None)),
        ("last loss", text.number(record.final_loss if record else None)),
        ("checkpoint", text.word(checkpoint)),
    ]
    if record is not None and record.exit_code is not None:
        rows.append(("exit code", str(record.exit_code)))
    if record is not None and record.code is not None:
        rows.append(("error", f"{record.code} (warden explain {record.code})"))
    return rows


def _origin(record: RunRecord | None, manifest: RunManifest | None) -> list[tuple[str, str]]:
    rows = []
    if record is not None:
        rows += [
            ("model", text.word(record.model)),
            ("started", f"{_moment(record.started_at)} UTC" + _again(record.starts)),
            ("ended", text.UNKNOWN if record.ended_at is None else f"{_moment(record.ended_at)} UTC"),
            ("command", record.command_line),
        ]
    if manifest is not None:
        rows.append(("trainwarden", manifest.version))
    return rows


def _again(starts: int) -> str:
    return "" if starts == 1 else f", {starts} times in all"


def _curve(history: History, *, unicode: bool, width: int) -> str:
    if not history.losses:
        return ""
    (first_step, first), (last_step, last) = history.losses[0], history.losses[-1]
    finite = [loss for _, loss in history.losses if math.isfinite(loss)]
    lowest = text.number(min(finite)) if finite else "NaN"
    lines = [
        f"  loss  step {first_step}: {text.number(first)}   lowest {lowest}   step {last_step}: {text.number(last)}",
        f"  {sparkline(history.losses, width=width, unicode=unicode)}",
    ]
    below = marks(history.losses, history.interventions, width=width)
    if below:
        lines.append(f"  {below}")
    if history.counts():
        lines.append(f"  {_legend(history)}")
    return "\n".join(lines)


def _legend(history: History) -> str:
    return "   ".join(
        f"{INTERVENTIONS[name]} {name.replace('_', ' ')}: {times}" for name, times in history.counts().items()
    )


def page_dict(
    record: RunRecord | None,
    manifest: RunManifest | None,
    history: History,
    *,
    path: str,
    resume_command: str | None,
) -> dict[str, Any]:
    """What ``run_page`` shows, JSON-serialisable; a loss that is not finite is a word."""
    return {
        "run": None if record is None else record.to_dict(),
        "path": path,
        "config": None if manifest is None else manifest.config,
        "resume_command": resume_command,
        "last_step": history.last_step,
        "checkpoint_path": (record.checkpoint_path if record else None) or history.checkpoint_path,
        "losses": [[step, loss if math.isfinite(loss) else str(loss)] for step, loss in history.losses],
        "interventions": [[step, name] for step, name in history.interventions],
    }


def _moment(stamp: str) -> str:
    return f"{datetime.fromisoformat(stamp):%Y-%m-%d %H:%M:%S}"


def _brief(value: int | None) -> str:
    # A column of the word "unknown" would hide what is known.
    return "-" if value is None else str(value)
