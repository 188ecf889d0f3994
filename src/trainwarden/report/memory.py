"""A preflight and the ceilings as text for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from trainwarden.memory.ceilings import TECHNIQUES, Technique
from trainwarden.memory.largest import Largest
from trainwarden.memory.prediction import KINDS
from trainwarden.report import text
from trainwarden.report.memory_chart import KIND_NAMES, headline, subline

if TYPE_CHECKING:
    from trainwarden.memory.remedies import Advice
    from trainwarden.train.preflight import PreflightReport

_SHOWN_CARDS = 6


def preflight_text(report: PreflightReport, chart: str, fitting: Sequence[str]) -> str:
    """Everything that a preflight found; ``chart`` is the picture, ``fitting`` the cards on which it would fit."""
    parts = [
        f"{headline(report)}\n{subline(report)}",
        chart,
        text.pairs(_answers(report, fitting)),
        _titled("peak", _shares(report)),
        _advice_text(report.advice),
        _listed("notes", report.prediction.notes),
        _listed("findings", [str(finding) for finding in report.findings]),
    ]
    return "\n\n".join(part for part in parts if part)


def _answers(report: PreflightReport, fitting: Sequence[str]) -> list[tuple[str, str]]:
    prediction, overheads = report.prediction, report.overheads
    where = f" by {prediction.operation}" if prediction.operation else ""
    added = f"{overheads.fragmentation:.0%} fragmentation, {text.size(overheads.context_bytes)} context"
    rows = [
        ("peak", f"{text.size(prediction.peak_bytes)} in {prediction.phase}{where}"),
        ("how known", f"{prediction.source}, ±{prediction.error:.0%}"),
        (
            "overheads",
            f"{added} ({overheads.source})" if overheads.context_bytes else "none: tensors alone are counted",
        ),
        ("needed", text.size(report.needed_bytes)),
    ]
    if prediction.host_bytes:
        rows.append(("host memory", text.size(prediction.host_bytes)))
    if report.device is not None:
        others = report.device.others_bytes
        taken = f", {text.size(others)} of it held by other processes" if others else ""
        rows.append(("device", f"{report.device.name}, {text.size(report.device.total_bytes)}{taken}"))
    else:
        shown = ", ".join(fitting[:_SHOWN_CARDS]) or "none of the cards listed by `warden ceilings --all`"
        rows.append(("fits on", shown + (", …" if len(fitting) > _SHOWN_CARDS else "")))
    plan = report.subject.plan
    if report.rows is not None:
        rows.append(("micro-batch", _largest(report.rows, f"rows of {plan.sequence_length} tokens", "row")))
    if report.tokens is not None:
        rows.append(("sequence", _longest(report.tokens, plan.micro_batch_size)))
    return rows


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _longest(found: Largest, rows: int) -> str:
    if found.value == 0:
        return f"not even the shortest fits ({text.size(found.bytes_at_value)} of tensors)"
    return f"up to about {found.value} tokens in {_rows(rows)} ({text.size(found.bytes_at_value)} of tensors)"


def _largest(found: Largest, unit: str, one: str) -> str:
    if found.value == 0:
        return f"not even one {one} fits ({text.size(found.bytes_at_value)} of tensors)"
    beyond = "" if found.next_bytes is None else f"; one {one} more, {text.size(found.next_bytes)}"
    return f"up to {found.value} {unit} ({text.size(found.bytes_at_value)} of tensors{beyond})"


def _shares(report: PreflightReport) -> list[tuple[str, str]]:
    peak, sizes = max(1, report.prediction.peak_bytes), report.prediction.breakdown
    shares = [(kind, f"{text.size(sizes[kind]):>11}  {sizes[kind] / peak:4.0%}") for kind in KINDS if sizes[kind]]
    return [(KIND_NAMES[kind], share) for kind, share in shares]


def _advice_text(advice: Advice | None) -> str:
    if advice is None:
        return ""
    rows = [
        (
            step.remedy.name,
            text.size(step.alone_bytes),
            text.size(step.together_bytes),
            "yes" if any(step.remedy is chosen for chosen in advice.changes) else "",
            step.remedy.cost,
        )
        for step in advice.steps
    ]
    listed = text.table(
        ("CHANGE", "ALONE", "WITH THOSE ABOVE", "TAKE", "COSTS"), rows, right=frozenset({"ALONE", "WITH THOSE ABOVE"})
    )
    return f"what would make it fit\n{_indented(listed)}\n{_indented(_verdict(advice))}"


def _verdict(advice: Advice) -> str:
    if advice.plan is None or advice.needed_bytes is None:
        return "none of them does"
    how = " ".join(change.flags(advice.plan) for change in advice.changes)
    return f"together {text.size(advice.needed_bytes)}: {how}"


def ceilings_text(rows: Mapping[str, Sequence[float]], sizes: Mapping[str, int], source: str) -> str:
    """Billions of parameters by card and technique."""
    headers = ("CARD", "MEMORY", *(technique.name.upper() for technique in TECHNIQUES))
    lines = [(card, text.size(sizes[card]), *(_billions(value) for value in values)) for card, values in rows.items()]
    body = text.table(headers, lines, right=frozenset(headers[1:]))
    about = text.pairs([(technique.name, technique.about) for technique in TECHNIQUES])
    return (
        f"largest model in billions of parameters\n\n{body}\n\n{about}\n\n"
        f"One row of 2,048 tokens, gradient checkpointing, a vocabulary of 128,256, models shaped like Llama.\n"
        f"Closed form; overheads {source}. `warden preflight` answers for a model of your own."
    )


def ceilings_one_text(card: str, size_bytes: int, values: Sequence[float], source: str) -> str:
    """Billions of parameters by technique for one card."""
    rows = [(t.name, _billions(value), t.about) for t, value in zip(TECHNIQUES, values, strict=True)]
    body = text.table(("TECHNIQUE", "BILLIONS", "WHAT IT IS"), rows, right=frozenset({"BILLIONS"}))
    return (
        f"{card}, {text.size(size_bytes)}: largest model by technique\n\n{body}\n\n"
        f"One row of 2,048 tokens, gradient checkpointing, a vocabulary of 128,256, models shaped like Llama.\n"
        f"Closed form; overheads {source}. `warden preflight` answers for a model of your own."
    )


def technique_dicts(techniques: Sequence[Technique] = TECHNIQUES) -> list[dict[str, str]]:
    return [{"name": technique.name, "about": technique.about} for technique in techniques]


def _billions(value: float) -> str:
    return "–" if value == 0.0 else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _titled(title: str, rows: Sequence[tuple[str, str]]) -> str:
    return f"{title}\n{text.pairs(rows)}" if rows else ""


def _listed(title: str, lines: Sequence[str]) -> str:
    return "\n".join([title, *(f"  {line}" for line in lines)]) if lines else ""


def _indented(block: str) -> str:
    return "\n".join(f"  {line}" for line in block.splitlines())
