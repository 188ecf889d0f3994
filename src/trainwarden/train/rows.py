"""What a training row means: a conversation or a plain text, whatever shape it was written in.

Nothing here reads files or knows tokenizers; a row that cannot be understood raises `RowError` or
`RowFormatError`, and the caller adds the file and the line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]

SUPPORTED_FORMATS = (
    "messages: [{role, content}, …]",
    "conversations: [{from, value}, …]",
    "instruction, [input], output",
    "prompt, completion | response",
    "question, answer",
    "text",
)

_ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}

# Tried in this order; the first whose two keys are both there decides.
_PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
)


class RowError(ValueError):
    """The row has a supported shape and an unusable value; the message says which."""


class RowFormatError(ValueError):
    """The row has none of the supported shapes; ``keys`` are those it does have."""

    def __init__(self, keys: Sequence[str]) -> None:
        super().__init__(f"keys {list(keys)} are of no supported format")
        self.keys = list(keys)


@dataclass(frozen=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True)
class Chat:
    """A conversation with at least one assistant turn; the loss is taken on the assistant's turns."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Text:
    """Plain text; the loss is taken on all of it."""

    text: str


Row = Chat | Text


def normalise(raw: Any) -> Row:
    """The meaning of one raw row (a mapping decoded from JSON, or one row of a data set).

    Keys whose value is ``None`` count as absent, because tabular data sets fill them so.
    Raises `RowFormatError` for an unknown shape and `RowError` for an unusable value in a known one.
    """
    if not isinstance(raw, Mapping):
        raise RowError(f"a row is a JSON object, this is a {_json_kind(raw)}")
    present = {str(key): value for key, value in raw.items() if value is not None}
    if "messages" in present:
        return _chat(present["messages"], "messages", "role", "content")
    if "conversations" in present:
        return _chat(present["conversations"], "conversations", "from", "value")
    for question, answer in _PAIRS:
        if question in present and answer in present:
            return _pair(present, question, answer)
    if "text" in present:
        return Text(_text(present["text"], "text"))
    raise RowFormatError(sorted(present))


def _chat(raw_messages: Any, key: str, role_key: str, content_key: str) -> Chat:
    if not isinstance(raw_messages, Sequence) or isinstance(raw_messages, str | bytes) or not raw_messages:
        raise RowError(f"`{key}` must be a list of at least one message")
    messages = tuple(_message(raw, f"{key}[{index}]", role_key, content_key) for index, raw in enumerate(raw_messages))
    if not any(message.role == "assistant" and message.content.strip() for message in messages):
        raise RowError(f"`{key}` has no assistant turn with content, so there is nothing to learn from")
    return Chat(messages)


def _message(raw: Any, place: str, role_key: str, content_key: str) -> Message:
    if not isinstance(raw, Mapping):
        raise RowError(f"`{place}` must be an object with `{role_key}` and `{content_key}`")
    # Both spellings occur inside both lists in published data sets.
    role = raw.get(role_key) or raw.get("role") or raw.get("from")
    content = raw.get(content_key)
    if content is None:
        content = raw.get("content") if raw.get("content") is not None else raw.get("value")
    if not isinstance(role, str) or role not in _ROLES:
        raise RowError(f"`{place}.{role_key}` must be one of {', '.join(sorted(_ROLES))}")
    return Message(_ROLES[role], _text(_joined_parts(content), f"{place}.{content_key}", may_be_empty=True))


def _joined_parts(content: Any) -> Any:
    """Content given as text parts (``[{"type": "text", "text": …}]``) as one string, all else as it is."""
    if not isinstance(content, list) or not content:
        return content
    parts = [part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
    return "".join(parts) if len(parts) == len(content) else content


def _pair(row: Mapping[str, Any], question: str, answer: str) -> Chat:
    prompt = _text(row[question], question)
    extra = _text(row["input"], "input", may_be_empty=True) if "input" in row else ""
    if extra.strip():
        prompt = f"{prompt}\n\n{extra}"
    messages = [Message("user", prompt), Message("assistant", _text(row[answer], answer))]
    if question == "instruction" and "system" in row:
        system = _text(row["system"], "system", may_be_empty=True)
        messages[:0] = [Message("system", system)] if system.strip() else []
    return Chat(tuple(messages))


def _text(value: Any, place: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise RowError(f"`{place}` must be text, not a {_json_kind(value)}")
    if not may_be_empty and not value.strip():
        raise RowError(f"`{place}` is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        # JSON can spell half a surrogate pair (\ud800); no tokenizer can encode it.
        raise RowError(f"`{place}` holds half of a surrogate pair, which is no text") from None
    return value


def _json_kind(value: Any) -> str:
    kinds = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)
