"""The block that a person sees when something failed: what, how far it got, and what to type next."""

from __future__ import annotations

from .base import WardenError
from .envelope import causes_of
from .redaction import cleaned, redact_usable

_WITHHELD = "(withheld: it could not be redacted)"


def failure_text(error: WardenError) -> str:
    """`error` in plain text: a sentence, then aligned lines that end in the exact resume command."""
    said = cleaned({"message": error.message, "suggestion": error.suggestion, "cause": _nearest_cause(error)})
    usable = {"checkpoint": error.checkpoint_path, "resume": error.resume_command}
    usable = cleaned(usable, dict.fromkeys(usable, lambda text: text and redact_usable(text)))
    rows = [
        ("caused by", said.get("cause", _WITHHELD)),
        ("to do", said.get("suggestion", _WITHHELD)),
        ("code", f"{error.code} (exit status {error.exit_code})"),
        ("last good step", error.steps_completed),
        ("checkpoint", usable.get("checkpoint", _WITHHELD)),
        ("explained by", f"warden explain {error.code}"),
        ("resume with", usable.get("resume", _WITHHELD)),
    ]
    shown = [(label, str(value)) for label, value in rows if value is not None]
    width = max(len(label) for label, _ in shown) + 2
    return "\n".join(
        [
            f"warden: {_one_line(said.get('message', _WITHHELD))}",
            "",
            *(f"  {label:<{width}}{_one_line(value)}" for label, value in shown),
        ]
    )


def _nearest_cause(error: WardenError) -> str | None:
    causes = causes_of(error)
    if not causes or causes[0]["message"] in error.message:  # said already
        return None
    return f"{causes[0]['type']}: {causes[0]['message']}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
