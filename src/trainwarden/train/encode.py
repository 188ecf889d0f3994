"""From rows to token ids and labels: the loss is on what the assistant says, or on all of a plain text."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trainwarden.errors import DatasetError
from trainwarden.train.rows import Chat, Row, Text
from trainwarden.train.tokenizer import marks_generation

IGNORED = -100  # the label that torch's cross entropy leaves out

_BATCH_ROWS = 256
_PROBE = "what-the-assistant-says"


@dataclass(frozen=True)
class Encoded:
    """One row ready for training: token ids and, of equal length, labels (`IGNORED` where no loss is taken).

    Arrays of 32-bit integers: lists of Python integers take ten times the memory.
    """

    input_ids: array[int]
    labels: array[int]

    @classmethod
    def of(cls, input_ids: Iterable[int], labels: Iterable[int]) -> Encoded:
        return cls(array("i", input_ids), array("i", labels))


@dataclass(frozen=True)
class EncodedRows:
    """All rows that fit, and what became of the others."""

    rows: list[Encoded]
    truncated: int
    dropped: int

    def notices(self, name: str, max_length: int) -> list[str]:
        """What a person should know about rows that were not taken whole."""
        total = len(self.rows) + self.dropped
        found = []
        if self.dropped:
            why = f"nothing to learn within the first {max_length} tokens"
            found.append(f"{name}: {self.dropped} of {total} rows were left out ({why})")
        if self.truncated:
            found.append(f"{name}: {self.truncated} of {total} rows were cut to {max_length} tokens")
        return found


def encode_rows(rows: Sequence[Row], tokenizer: Any, *, max_length: int, name: str) -> EncodedRows:
    """Tokenise, mask and truncate; order is kept.

    A row whose first ``max_length`` tokens hold no target (a causal model predicts from the second token on)
    is dropped and counted. Raises `DatasetError` when no row is left, or when the chat template hides where
    the assistant speaks. ``name`` says in messages whose rows these are.
    """
    kept: list[Encoded] = []
    truncated = dropped = 0
    for encoded in _encoded(rows, tokenizer, name):
        cut = Encoded(encoded.input_ids[:max_length], encoded.labels[:max_length])
        if all(label == IGNORED for label in cut.labels[1:]):
            dropped += 1
            continue
        truncated += len(cut.input_ids) < len(encoded.input_ids)
        kept.append(cut)
    if not kept:
        problem = f"none of the {dropped} rows of {name} has anything to learn within the first {max_length} tokens"
        raise DatasetError(problem=problem, suggestion="Raise max_length, or shorten the prompts.")
    return EncodedRows(kept, truncated, dropped)


def _encoded(rows: Sequence[Row], tokenizer: Any, name: str) -> Iterator[Encoded]:
    """In batches, because a fast tokenizer works through a batch on all cores."""
    for start in range(0, len(rows), _BATCH_ROWS):
        batch = rows[start : start + _BATCH_ROWS]
        texts = iter(_encode_texts([row.text for row in batch if isinstance(row, Text)], tokenizer))
        numbered = [(start + index + 1, row) for index, row in enumerate(batch) if isinstance(row, Chat)]
        chats = iter(_encode_chats(numbered, tokenizer, name))
        for row in batch:
            yield next(texts) if isinstance(row, Text) else next(chats)


def _encode_texts(texts: list[str], tokenizer: Any) -> Iterator[Encoded]:
    if not texts:
        return
    end = tokenizer.eos_token_id
    for input_ids in tokenizer(texts, verbose=False)["input_ids"]:
        ids = list(input_ids) if end is None or input_ids[-1:] == [end] else [*input_ids, end]
        yield Encoded.of(ids, ids)


def _encode_chats(chats: list[tuple[int, Chat]], tokenizer: Any, name: str) -> Iterator[Encoded]:
    if not chats:
        return
    encode_marked = marks_generation(tokenizer)
    rendered: list[str] = []
    spans: list[list[tuple[int, int]]] = []
    for number, chat in chats:
        messages = [{"role": message.role, "content": message.content} for message in chat.messages]
        try:
            if encode_marked:
                yield _encode_marked(messages, tokenizer)
            else:
                rendered.append(_render(tokenizer, messages))
                spans.append(_assistant_spans(tokenizer, messages, rendered[-1]))
        except Exception as error:  # boundary: a template is a foreign program and may raise anything
            problem = f"the model's chat template cannot format row {number} of {name}: {error}"
            raise DatasetError(problem=problem) from error
    if not encode_marked:
        encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for ids, offsets, found in zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True):
            yield Encoded.of(ids, _labels(ids, offsets, found))


def _encode_marked(messages: list[dict[str, str]], tokenizer: Any) -> Encoded:
    """By the ``{% generation %}`` marks of the template."""
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, spoken = encoded["input_ids"], encoded["assistant_masks"]
    return Encoded.of(ids, [token if by else IGNORED for token, by in zip(ids, spoken, strict=True)])


def _labels(ids: Sequence[int], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """The id where a token begins inside a span of characters, `IGNORED` elsewhere."""
    return [
        token if any(begin <= start < end for begin, end in spans) and stop > start else IGNORED
        for token, (start, stop) in zip(ids, offsets, strict=True)
    ]


def _assistant_spans(tokenizer: Any, messages: list[dict[str, str]], text: str) -> list[tuple[int, int]]:
    """Where in ``text`` the assistant speaks, its end-of-turn marker included: character spans.

    For templates without marks. Several rewrite earlier turns (Qwen drops their reasoning) or open the turn
    with text of their own, so a prefix rendered alone is looked for first, and the content itself where that
    fails.
    """
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            content = message["content"]
            start = _turn_start(tokenizer, messages[:index], text, content, spans[-1][1] if spans else 0)
            end = _turn_end(tokenizer, messages[: index + 1], text, content.strip(), start)
            # Its last line alone, because templates reformat the reasoning that may come before.
            _find(text[:end], content.strip().rpartition("\n")[2], start)
            spans.append((start, end))
    return spans


def _turn_start(tokenizer: Any, before: list[dict[str, str]], text: str, content: str, earliest: int) -> int:
    """Behind the generation prompt, as at inference; else where the content begins."""
    if not before:
        # Templates fail on no messages, so the opening of the first turn is seen on one with a known content.
        prefix = _render(tokenizer, [{"role": "assistant", "content": _PROBE}]).partition(_PROBE)[0]
        return len(prefix) if text.startswith(prefix) else _find(text, content.strip(), earliest)
    for add_generation_prompt in (True, False):
        prefix = _render(tokenizer, before, add_generation_prompt=add_generation_prompt)
        if text.startswith(prefix):
            if add_generation_prompt:
                return len(prefix)
            earliest = len(prefix)
    return _find(text, content.strip(), earliest)


def _turn_end(tokenizer: Any, turns: list[dict[str, str]], text: str, content: str, start: int) -> int:
    """Behind the end-of-turn marker; white space that the template adds after it is not the assistant's."""
    upto = _render(tokenizer, turns)
    if text.startswith(upto):
        return len(upto.rstrip())
    marker = upto[upto.rfind(content) + len(content) :].rstrip()
    end = _find(text, content, start) + len(content)
    return end + len(marker) if text.startswith(marker, end) else end


def _find(text: str, content: str, start: int) -> int:
    found = text.find(content, start)
    if found < 0:
        raise ValueError(
            "it rewrites an assistant turn, which can then not be found; {% generation %} marks would help"
        )
    return found


def _render(tokenizer: Any, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
