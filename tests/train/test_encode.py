"""Which tokens the loss is taken on, token by token, under templates of several habits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.train.tiny import chat
from trainwarden.errors import DatasetError
from trainwarden.train.encode import IGNORED, Encoded, encode_rows
from trainwarden.train.rows import Chat, Row, Text
from trainwarden.train.tokenizer import FALLBACK_CHAT_TEMPLATE, ensure_chat_template, marks_generation

DIALOGUE = chat(
    ("system", "Be brief"), ("user", "red?"), ("assistant", "green"), ("user", "blue?"), ("assistant", "stone lamp")
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama 3: content is trimmed, and a beginning-of-text marker comes first.
TRIMMING = (
    "<|pad|>{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# As Qwen 3: the last assistant turn opens with a block that earlier ones have not.
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As several reasoning models: the generation prompt says more than a finished turn shows.
OPENING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)
# As Mistral: no role for the assistant, its turn just follows.
INST = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}<|im_end|>"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)
# Templates that index into the messages fail on none.
FIRST_MESSAGE = "{{ messages[0]['role'] }}: " + CHATML


def with_template(tokenizer: Any, template: str) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def encode(row: Row, tokenizer: Any, max_length: int = 512) -> Encoded:
    return encode_rows([row], tokenizer, max_length=max_length, name="test").rows[0]


def spoken(encoded: Encoded, tokenizer: Any) -> list[str]:
    """The stretches of text that the loss is taken on."""
    stretches: list[list[int]] = [[]]
    for label in encoded.labels:
        if label == IGNORED:
            stretches.append([])
        else:
            stretches[-1].append(label)
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


def test_the_fallback_template_teaches_what_the_assistant_says_and_how_it_ends(tokenizer: Any) -> None:
    encoded = encode(DIALOGUE, tokenizer)
    assert tokenizer.decode(encoded.input_ids) == (
        "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nred?<|im_end|>\n"
        "<|im_start|>assistant\ngreen<|im_end|>\n<|im_start|>user\nblue?<|im_end|>\n"
        "<|im_start|>assistant\nstone lamp<|im_end|>\n"
    )
    assert spoken(encoded, tokenizer) == ["green<|im_end|>", "stone lamp<|im_end|>"]


def test_labels_are_the_ids_or_ignored(tokenizer: Any) -> None:
    encoded = encode(DIALOGUE, tokenizer)
    assert len(encoded.labels) == len(encoded.input_ids)
    assert all(label in (IGNORED, token) for label, token in zip(encoded.labels, encoded.input_ids, strict=True))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["green<|im_end|>", "stone lamp<|im_end|>"]),
        (TRIMMING, ["green<|im_end|>", "stone lamp<|im_end|>"]),
        (REASONING, ["green<|im_end|>", "<think></think>stone lamp<|im_end|>"]),
        (OPENING, ["green<|im_end|>", "stone lamp<|im_end|>"]),
        (INST, [" green<|im_end|>", " stone lamp<|im_end|>"]),
        (FIRST_MESSAGE, ["green<|im_end|>", "stone lamp<|im_end|>"]),
    ],
    ids=["chatml", "trimming", "reasoning", "opening", "inst", "first message"],
)
def test_templates_without_marks_are_masked_by_finding_the_turns(
    tokenizer: Any, template: str, expected: list[str]
) -> None:
    changed = with_template(tokenizer, template)
    assert not marks_generation(changed)
    assert spoken(encode(DIALOGUE, changed), changed) == expected


def test_marks_and_search_agree_on_the_same_template(tokenizer: Any) -> None:
    assert marks_generation(tokenizer)
    found = encode(DIALOGUE, with_template(tokenizer, CHATML))
    assert found == encode(DIALOGUE, tokenizer)


def test_a_question_that_repeats_the_answer_is_not_taken_for_it(tokenizer: Any) -> None:
    row = chat(("user", "green"), ("assistant", "green"))
    for template in (CHATML, TRIMMING, OPENING):
        changed = with_template(tokenizer, template)
        labels = encode(row, changed).labels
        first = next(i for i, label in enumerate(labels) if label != IGNORED)
        assert all(label == IGNORED for label in labels[:first])
        assert first > len(labels) // 2, template
        assert spoken(encode(row, changed), changed) == ["green<|im_end|>"]


def test_a_conversation_may_begin_with_the_assistant(tokenizer: Any) -> None:
    row = chat(("assistant", "green"), ("user", "red"), ("assistant", "blue"))
    changed = with_template(tokenizer, FIRST_MESSAGE)
    assert spoken(encode(row, changed), changed) == ["green<|im_end|>", "blue<|im_end|>"]


def test_a_word_of_the_template_is_not_taken_for_what_is_said(tokenizer: Any) -> None:
    row = chat(("assistant", "assistant"), ("user", "user"), ("assistant", "im_start"))
    changed = with_template(tokenizer, CHATML)
    assert spoken(encode(row, changed), changed) == ["assistant<|im_end|>", "im_start<|im_end|>"]


def test_a_template_that_refuses_a_row_is_a_data_error_with_the_row_number(tokenizer: Any) -> None:
    strict = with_template(tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DatasetError, match=r"row 2 of test: .*roles must alternate"):
        encode_rows([Text("red"), DIALOGUE], strict, max_length=64, name="test")


def test_a_template_that_hides_what_is_said_is_a_data_error(tokenizer: Any) -> None:
    hiding = with_template(tokenizer, "{% for m in messages %}[{{ m['role'] }}]{% endfor %}")
    with pytest.raises(DatasetError, match="rewrites an assistant turn"):
        encode(DIALOGUE, hiding)


def test_plain_text_is_learned_whole_and_ends(tokenizer: Any) -> None:
    encoded = encode(Text("red green"), tokenizer)
    assert list(encoded.labels) == list(encoded.input_ids)
    assert tokenizer.decode(encoded.input_ids) == "red green<|im_end|>"


def test_order_is_kept_when_texts_and_chats_are_mixed(tokenizer: Any) -> None:
    rows: list[Row] = [Text(f"red {i}") if i % 3 else chat(("user", "?"), ("assistant", f"{i}")) for i in range(600)]
    encoded = encode_rows(rows, tokenizer, max_length=64, name="test").rows
    for row, one in zip(rows, encoded, strict=True):
        expected = row.text if isinstance(row, Text) else row.messages[1].content
        assert spoken(one, tokenizer) == [f"{expected}<|im_end|>"]


def test_truncation_cuts_ids_and_labels_alike_and_is_counted(tokenizer: Any) -> None:
    whole = encode(Text("red green blue " * 20), tokenizer)
    result = encode_rows([Text("red green blue " * 20)], tokenizer, max_length=10, name="test")
    assert (result.truncated, result.dropped) == (1, 0)
    assert result.rows[0].input_ids == whole.input_ids[:10]
    assert result.notices("test", 10) == ["test: 1 of 1 rows were cut to 10 tokens"]


def test_a_row_without_a_target_after_the_cut_is_dropped_and_counted(tokenizer: Any) -> None:
    long_question = chat(("user", "red " * 50), ("assistant", "green"))
    result = encode_rows([long_question, DIALOGUE], tokenizer, max_length=50, name="test")
    assert result.dropped == 1
    assert len(result.rows) == 1
    assert "test: 1 of 2 rows were left out" in result.notices("test", 50)[0]


def test_a_target_in_the_first_place_is_none_because_nothing_predicts_it(tokenizer: Any) -> None:
    result = encode_rows([Text("red"), Text("red green blue")], tokenizer, max_length=2, name="test")
    assert result.dropped == 0
    single = tokenizer("red")["input_ids"]
    changed = copy.deepcopy(tokenizer)
    changed.eos_token = None
    if len(single) == 1:
        with pytest.raises(DatasetError):
            encode_rows([Text("red")], changed, max_length=8, name="test")


def test_nothing_left_to_learn_is_an_error_with_advice(tokenizer: Any) -> None:
    with pytest.raises(DatasetError, match="none of the 1 rows of test") as caught:
        encode_rows([chat(("user", "red " * 50), ("assistant", "x"))], tokenizer, max_length=20, name="test")
    assert "max_length" in caught.value.suggestion


def test_a_tokenizer_with_a_template_keeps_it(tokenizer: Any) -> None:
    own = with_template(tokenizer, CHATML)
    assert ensure_chat_template(own) is False
    assert own.chat_template == CHATML


def test_a_tokenizer_without_template_and_end_token_gets_both_spelled_out(tokenizer: Any) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template, bare.eos_token = None, None
    assert ensure_chat_template(bare) is True
    assert bare.chat_template != FALLBACK_CHAT_TEMPLATE
    assert spoken(encode(DIALOGUE, bare), bare) == ["green<|im_end|>", "stone lamp<|im_end|>"]


CONTENT = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="<"), max_size=20)
TURNS = st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), CONTENT), min_size=1, max_size=5).filter(
    lambda turns: any(role == "assistant" and text.strip() for role, text in turns)
)


@given(turns=TURNS)
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
def test_the_assistant_and_only_the_assistant_is_learned(tokenizer: Any, turns: list[tuple[str, str]]) -> None:
    row: Chat = chat(*turns)
    expected = "".join(f"{text}<|im_end|>" for role, text in turns if role == "assistant")
    encoded = encode(row, tokenizer)
    assert tokenizer.decode([label for label in encoded.labels if label != IGNORED]) == expected
    assert encode(row, with_template(tokenizer, CHATML)) == encoded
