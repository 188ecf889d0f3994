"""`warden explain`: find a condition by code or alias and say what it means, as text, Markdown or JSON."""

from __future__ import annotations

from .base import Retry, WardenError
from .exits import EXIT_STATUSES
from .inputs import UnknownCodeError
from .pages import SECTIONS, sections_of, summary_of
from .profiles import ExitProfile, exit_status
from .registry import find, known_names, registry
from .values import JSON

_WIDTH = 88
_RETRY_MEANINGS = {
    Retry.NEVER: "the same request fails the same way",
    Retry.BACKOFF: "wait, then try again: the cause is outside and passes",
    Retry.AFTER_CHANGE: "change something first",
    Retry.AFTER_COOLDOWN: "wait until the hardware has recovered",
    Retry.RESUME: "start again from the checkpoint: nothing was wrong",
}


def lookup(code_or_alias: str) -> type[WardenError]:
    """The condition that a code or an alias stands for, in upper or lower case.

    Raises UnknownCodeError with the closest known names.
    """
    condition = find(code_or_alias)
    if condition is None:
        from difflib import (
            get_close_matches,
        )  # only on this path: it costs as much as the rest of an explanation

        asked = code_or_alias.strip()
        raise UnknownCodeError(asked=asked, closest=get_close_matches(asked.upper(), known_names(), n=3, cutoff=0.5))
    return condition


def describe(condition: type[WardenError]) -> dict[str, JSON]:
    """Everything that is written about a condition, as one JSON object."""
    docstring = condition.__doc__ or ""
    sections = sections_of(docstring)
    return {
        "code": condition.code,
        "type": condition.__name__,
        "summary": summary_of(docstring),
        "exit_code": condition.exit_code,
        "exit_meaning": EXIT_STATUSES[condition.exit_code].meaning,
        "exit_profiles": {str(profile): exit_status(condition, profile) for profile in ExitProfile},
        "http_status": condition.http_status,
        "retry": str(condition.retry),
        "retry_meaning": _RETRY_MEANINGS[condition.retry],
        "aliases": list(condition.aliases),
        "message": condition.template,
        "suggestion": condition.suggestion,
        "details": dict(condition.fields),
        "sections": {title: sections.get(title, "") for title in SECTIONS},
    }


def explain_text(code_or_alias: str) -> str:
    """One condition for a terminal, 88 columns wide. Raises UnknownCodeError."""
    about = describe(lookup(code_or_alias))
    facts = [(name, value) for name, value in _facts(about) if value]
    width = max(len(name) for name, _ in facts) + 2
    lines = [f"{about['code']}  ({about['type']})", *_wrapped(about["summary"]), ""]
    for name, value in facts:
        first, *rest = _wrapped(value)
        lines += [f"  {name:<{width}}{first}", *(f"  {'':<{width}}{line}" for line in rest)]
    for title, text in about["sections"].items():
        lines += ["", title.upper(), *_blocks(text)]
    return "\n".join(lines)


def explain_markdown(code_or_alias: str) -> str:
    """One condition as its documentation page. Raises UnknownCodeError."""
    about = describe(lookup(code_or_alias))
    lines = [f"# {about['code']}", "", about["summary"], "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in [("class", f"`{about['type']}`"), *_facts(about)] if value]
    for title, text in about["sections"].items():
        lines += ["", f"## {title}", "", text]
    return "\n".join(lines) + "\n"


def explain_json(code_or_alias: str) -> str:
    """One condition as a JSON object in text form. Raises UnknownCodeError."""
    return _dumps(describe(lookup(code_or_alias)))


def explain_all_text() -> str:
    """Every condition on one line each: code, exit status, summary."""
    rows = [describe(condition) for condition in sorted_conditions()]
    width = max(len(row["code"]) for row in rows)
    return "\n".join(f"{row['code']:<{width}}  {row['exit_code']:>3}  {row['summary']}" for row in rows)


def explain_all_json() -> str:
    """Every condition as a JSON list in text form, sorted by code."""
    return _dumps([describe(condition) for condition in sorted_conditions()])


def sorted_conditions() -> list[type[WardenError]]:
    """Every condition in the order of its code."""
    return [condition for _, condition in sorted(registry().items())]


def _facts(about: dict[str, JSON]) -> list[tuple[str, str]]:
    others = {name: status for name, status in about["exit_profiles"].items() if name != ExitProfile.WARDEN}
    return [
        ("exit status", f"{about['exit_code']} ({about['exit_meaning']})"),
        ("in other profiles", ", ".join(f"{name} {status}" for name, status in others.items())),
        ("HTTP status", str(about["http_status"])),
        ("retry", f"{about['retry']}: {about['retry_meaning']}"),
        ("aliases", ", ".join(about["aliases"])),
        ("details", ", ".join(about["details"])),
    ]


def _blocks(markdown: str) -> list[str]:
    # Paragraphs are filled anew, list items hang, and fenced code is indented instead of fenced.
    lines: list[str] = []
    paragraph: list[str] = []
    fenced = False
    for line in [*markdown.split("\n"), ""]:
        starts_block = line.startswith(("```", "- ")) or not line
        if paragraph and not fenced and starts_block:
            lines += _wrapped(" ".join(paragraph))
            paragraph = []
        if line.startswith("```"):
            fenced = not fenced
        elif fenced:
            lines.append(f"    {line}".rstrip())
        elif line:
            paragraph.append(line.strip())
        else:
            lines.append("")
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _wrapped(text: str) -> list[str]:
    from textwrap import wrap

    hanging = "  " if text.startswith("- ") else ""
    return wrap(text, _WIDTH, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False)


def _dumps(value: JSON) -> str:
    import json

    return json.dumps(value, indent=2, ensure_ascii=False)
