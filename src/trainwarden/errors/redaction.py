"""Take secrets and home paths out of text before it leaves the process.

Secrets become ``***``; a home directory becomes ``~``. Patterns are bounded so that a long line costs linear
time. In doubt, text is hidden: a lost word is cheaper than a leaked key.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Final

from .values import JSON

MARK: Final = "***"

_NOT_A_SECRET = "".join(f"(?<!{kind}[_-])" for kind in ("pad", "eos", "bos", "unk", "sep", "cls", "mask"))
_WORD = (
    rf"(?:{_NOT_A_SECRET}token|password|passwd|passphrase|secret|credentials?"
    r"|(?:api|access|private|secret)[_-]?key(?:[_-]?id)?)"
)
_VALUE = r"""(?:"[^"\n]*"?|'[^'\n]*'?|[^\s,;&"')\]}]+)"""
_SCHEME = r"(?:(?:bearer|basic|digest|token|negotiate|apikey)\s+)?"

_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----(?s:.*?)(?:-----END [A-Z ]{0,30}PRIVATE KEY-----|\Z)"),
        MARK,
    ),
    # Keys that say what they are: Hugging Face, GitHub, GitLab, OpenAI, Slack, Google, AWS, JSON web tokens.
    (re.compile(r"(?<![A-Za-z0-9])(?:hf_|gh[pousr]_|api_org_)[A-Za-z0-9]{16,}"), MARK),
    (re.compile(r"(?<![A-Za-z0-9])(?:github_pat_|glpat-|sk-|xox[abprs]-|AIza)[\w-]{16,}"), MARK),
    (re.compile(r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"), MARK),
    (re.compile(r"(?<![\w-])eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?"), MARK),
    (re.compile(r"\b([a-z][a-z0-9+.-]{0,20}://)[^/\s\"'<>]*@", re.IGNORECASE), rf"\1{MARK}@"),
    (
        re.compile(rf"""(authorization[\\"']{{0,4}}\s*[:=]\s*[\\"']{{0,4}}{_SCHEME})[^\s"',;]+""", re.I),
        rf"\1{MARK}",
    ),
    (re.compile(r"\b(bearer\s+)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE), rf"\1{MARK}"),
    (re.compile(rf"""({_WORD}[\\"']{{0,4}}\s*[:=]\s*)\\*{_VALUE}""", re.IGNORECASE), rf"\1{MARK}"),
    (re.compile(rf"((?<![\w-])--[\w-]{{0,40}}?{_WORD}\s+)(?!-){_VALUE}", re.IGNORECASE), rf"\1{MARK}"),
)
_SECRET_KEY = re.compile(rf"(?:.*[^a-z0-9])?(?:{_WORD}|authorization)", re.IGNORECASE)

# A path begins here: not inside a longer path or a URL, but after file:// or a glued option such as -I.
_PATH_START = r"(?:(?<![\w.~/-])|(?<=file://)|(?<=\s-[A-Za-z]))"
_ANY_HOME = re.compile(
    rf"""{_PATH_START}/(?:home|Users)/[^/\s:;,'"<>|)\]}}]+|\b[A-Za-z]:\\{{1,2}}Users\\{{1,2}}[^\\\s:;,'"<>|)\]}}]+"""
)

_dropped = 0


def redact(text: str) -> str:
    """`text` with its secrets replaced by ``***`` and home directories by ``~``."""
    return _ANY_HOME.sub("~", _abbreviate_home(_hide_secrets(text)))


def redact_usable(text: str) -> str:
    """`text`, a path or a command line, without secrets but still usable as it stands.

    Only the present user's home directory is abbreviated, and only where a shell (or `Path.expanduser`) would
    put it back: at the beginning of a word, and nowhere in a text with quotes.
    """
    text = _hide_secrets(text)
    home = _home()
    if home is None or any(quote in text for quote in "'\"\\"):
        return text
    return re.sub(rf"(?<!\S){re.escape(home)}(?=/|\s|\Z)", "~", text)


def redact_value(value: JSON) -> JSON:
    """A JSON value with its strings redacted, and all that stands under a key such as ``hf_token`` hidden."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, list):
        return [redact_value(item) for item in value]
    if isinstance(value, dict):
        return {redact(key): _redact_item(key, item) for key, item in value.items()}
    return value


def cleaned(values: dict[str, JSON], cleaners: dict[str, Callable[[JSON], JSON]] | None = None) -> dict[str, JSON]:
    """`values`, each passed through its cleaner (`redact_value` by default); what fails is dropped.

    A dropped field is counted and never replaces the error that is being written.
    """
    global _dropped
    result = {}
    for name, value in values.items():
        try:
            result[name] = (cleaners or {}).get(name, redact_value)(value)
        except Exception:  # noqa: BLE001 - boundary: whatever fails here must not hide the original error
            _dropped += 1
    return result


def dropped_fields() -> int:
    """How many fields this process has left out because they could not be redacted."""
    return _dropped


def _redact_item(key: str, value: JSON) -> JSON:
    if value is not None and not isinstance(value, bool) and _SECRET_KEY.fullmatch(key):
        return MARK
    return redact_value(value)


def _hide_secrets(text: str) -> str:
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def _abbreviate_home(text: str) -> str:
    home = _home()
    return text if home is None else re.sub(rf"{_PATH_START}{re.escape(home)}(?![\w-])", "~", text)


def _home() -> str | None:
    home = os.path.expanduser("~").rstrip("/\\")  # noqa: PTH111 - pathlib costs more than this whole module to import
    return home if len(home) > 1 and home != "~" else None
