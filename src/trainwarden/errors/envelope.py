"""An error as one JSON object: the shape that logs, `--output-format json` and HTTP bodies share.

Keys: ``type, code, message, retryable, retry, suggestion, details, exit_code, http_status, run_id,
steps_completed, checkpoint_path, resume_command, aliases, cause``, the last a list of
``{type, code?, message}`` from the nearest cause to the root. Strings are redacted; ``checkpoint_path`` and
``resume_command`` stay usable (``~`` is the present user's home). What cannot be redacted is left out, and
``fields_dropped`` says how many fields were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .redaction import cleaned, dropped_fields, redact_usable
from .values import JSON, finite, text_of

if TYPE_CHECKING:
    from .base import WardenError

_MAX_CAUSES = 16


def envelope(error: WardenError) -> dict[str, JSON]:
    """`error` as a JSON object; never raises."""
    dropped_before = dropped_fields()
    details = cleaned(error.details)
    usable = dict.fromkeys(("checkpoint_path", "resume_command"), _usable)
    fields = {
        "type": type(error).__name__,
        "code": error.code,
        "message": error.message,
        "retryable": error.retryable,
        "retry": str(error.retry),
        "suggestion": error.suggestion,
        "details": details,
        "exit_code": error.exit_code,
        "http_status": error.http_status,
        "run_id": error.run_id,
        "steps_completed": error.steps_completed,
        "checkpoint_path": error.checkpoint_path,
        "resume_command": error.resume_command,
        "aliases": list(error.aliases),
        "cause": causes_of(error),
    }
    result: dict[str, JSON] = finite(cleaned(fields, {**usable, "details": _as_it_is}))
    if dropped_fields() > dropped_before:
        result["fields_dropped"] = dropped_fields() - dropped_before
    return result


def causes_of(error: WardenError) -> list[dict[str, JSON]]:
    """The chain that led to `error`, nearest first; after unpickling, what was known of it before."""
    chain: list[dict[str, JSON]] = []
    seen = {id(error)}
    cause = _cause(error)
    while cause is not None and id(cause) not in seen and len(chain) < _MAX_CAUSES:
        seen.add(id(cause))
        chain.append(_link(cause))
        cause = _cause(cause)
    return chain or error.earlier_causes


def _cause(error: BaseException) -> BaseException | None:
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _link(cause: BaseException) -> dict[str, JSON]:
    kind = type(cause)
    code = getattr(kind, "code", None)  # of the class: an instance may hold a status of its own, as SystemExit does
    if isinstance(code, str) and code:
        return {"type": kind.__name__, "code": code, "message": text_of(getattr(cause, "message", cause))}
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return {"type": name, "message": text_of(cause)}


def _usable(value: JSON) -> JSON:
    return redact_usable(value) if isinstance(value, str) else value


def _as_it_is(value: JSON) -> JSON:
    return value
