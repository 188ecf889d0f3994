"""Tokenizers: a chat template for one that has none, and a small one learned from the data itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from trainwarden.train.rows import Chat, Row

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"

# ChatML, with the tokenizer's own end-of-sequence token closing each turn. It is stored with the saved model,
# so that inference formats conversations as training did. `generation` marks what the assistant says, the end
# of its turn included: that is what the loss is taken on.
FALLBACK_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}"
    "{{ message['content'] + eos_token }}"
    "{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

# Merges learned from this much text serve a small vocabulary as well as those learned from all of it.
_TRAINING_CHARACTERS = 4_000_000


def ensure_chat_template(tokenizer: Any) -> bool:
    """Give a tokenizer without a chat template the fallback one; True when that was necessary."""
    if tokenizer.chat_template:
        return False
    if tokenizer.eos_token is None:
        tokenizer.chat_template = FALLBACK_CHAT_TEMPLATE.replace("eos_token", f"'{END}'")
    else:
        tokenizer.chat_template = FALLBACK_CHAT_TEMPLATE
    return True


def marks_generation(tokenizer: Any) -> bool:
    """Whether the chat template itself says which part the assistant generates."""
    template = tokenizer.chat_template
    return isinstance(template, str) and _GENERATION_MARK.search(template) is not None


def train_tokenizer(rows: Sequence[Row], *, vocab_size: int) -> Any:
    """A byte-level BPE `PreTrainedTokenizerFast` learned from ``rows``; the same rows give the same one.

    At most ``vocab_size`` entries, at least the 256 bytes and the special tokens, so that it encodes any
    text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_texts(rows), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False
    )
    wrapped.chat_template = FALLBACK_CHAT_TEMPLATE
    return wrapped


def _training_texts(rows: Sequence[Row]) -> Iterator[str]:
    left = _TRAINING_CHARACTERS
    for row in rows:
        if left <= 0:
            return
        for text in _texts(row):
            left -= len(text)
            yield text


def _texts(row: Row) -> Iterator[str]:
    if isinstance(row, Chat):
        for message in row.messages:
            yield f"{message.role}\n{message.content}"
    else:
        yield row.text
