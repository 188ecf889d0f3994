"""What a row means, whatever shape it was written in."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwarden.train.rows import Chat, Message, RowError, RowFormatError, Text, normalise

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"


def turns(*pairs: tuple[str, str]) -> Chat:
    return Chat(tuple(Message(role, content) for role, content in pairs))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
            turns((USER, "Hi"), (ASSISTANT, "Ho")),
        ),
        (
            {"messages": [{"role": "developer", "content": "Be brief"}, {"role": "assistant", "content": "Ho"}]},
            turns((SYSTEM, "Be brief"), (ASSISTANT, "Ho")),
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
            turns((USER, "Hi"), (ASSISTANT, "Ho")),
        ),
        (
            {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
            turns((USER, "Hi"), (ASSISTANT, "Ho")),
        ),
        ({"instruction": "Add", "output": "3"}, turns((USER, "Add"), (ASSISTANT, "3"))),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, turns((USER, "Add\n\n1 2"), (ASSISTANT, "3"))),
        ({"instruction": "Add", "input": " ", "output": "3"}, turns((USER, "Add"), (ASSISTANT, "3"))),
        (
            {"system": "Be brief", "instruction": "Add", "output": "3"},
            turns((SYSTEM, "Be brief"), (USER, "Add"), (ASSISTANT, "3")),
        ),
        ({"prompt": "Hi", "completion": "Ho"}, turns((USER, "Hi"), (ASSISTANT, "Ho"))),
        ({"prompt": "Hi", "response": "Ho"}, turns((USER, "Hi"), (ASSISTANT, "Ho"))),
        ({"question": "Hi?", "answer": "Ho"}, turns((USER, "Hi?"), (ASSISTANT, "Ho"))),
        ({"text": "Once upon a time"}, Text("Once upon a time")),
    ],
)
def test_each_format_gives_the_same_meaning(raw: Any, expected: Any) -> None:
    assert normalise(raw) == expected


def test_absent_columns_of_a_table_are_none_and_do_not_count() -> None:
    assert normalise({"messages": None, "prompt": None, "text": "plain"}) == Text("plain")


def test_the_richest_format_wins_when_a_row_has_several() -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert normalise({"text": "…", "prompt": "p", "completion": "c", "messages": chat}) == turns(
        (USER, "Hi"), (ASSISTANT, "Ho")
    )


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert normalise({"messages": [{"role": "assistant", "content": parts}]}) == turns((ASSISTANT, "one two"))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ([], "a row is a JSON object"),
        ("text", "string"),
        (None, "null"),
        ({"messages": []}, "at least one message"),
        ({"messages": "Hi"}, "list"),
        ({"messages": ["Hi"]}, r"`messages\[0\]` must be an object"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "no assistant turn"),
        ({"messages": [{"role": "assistant", "content": "  "}]}, "no assistant turn"),
        ({"messages": [{"role": "wizard", "content": "Hi"}]}, r"`messages\[0\].role` must be one of"),
        ({"messages": [{"role": 7, "content": "Hi"}]}, "must be one of"),
        ({"messages": [{"role": "assistant", "content": 7}]}, "must be text, not a number"),
        ({"messages": [{"role": "assistant", "content": None}]}, "must be text, not a null"),
        ({"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}, "must be text, not a list"),
        ({"conversations": [{"from": "gpt"}]}, r"`conversations\[0\].value`"),
        ({"instruction": "Add", "output": ""}, "`output` is empty"),
        ({"instruction": "", "output": "3"}, "`instruction` is empty"),
        ({"instruction": "Add", "input": 7, "output": "3"}, "`input` must be text"),
        ({"prompt": ["Hi"], "completion": "Ho"}, "`prompt` must be text"),
        ({"text": " \n"}, "`text` is empty"),
        ({"text": True}, "not a boolean"),
        ({"text": "half \ud800"}, "half of a surrogate pair"),
    ],
)
def test_an_unusable_value_is_named(raw: Any, words: str) -> None:
    with pytest.raises(RowError, match=words):
        normalise(raw)


@pytest.mark.parametrize("raw", [{}, {"foo": 1}, {"instruction": "no answer"}, {"prompt": "x", "text": None}])
def test_an_unknown_shape_names_the_keys_it_has(raw: Any) -> None:
    with pytest.raises(RowFormatError) as caught:
        normalise(raw)
    assert caught.value.keys == sorted(key for key, value in raw.items() if value is not None)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(
    ["messages", "conversations", "instruction", "input", "output", "prompt", "completion", "text", "system"]
)
TURN = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "other"]) | JSON_VALUES,
        "from": st.sampled_from(["human", "gpt"]) | JSON_VALUES,
        "content": JSON_VALUES,
        "value": JSON_VALUES,
    },
)


@given(st.dictionaries(KEYS | st.text(), JSON_VALUES | st.lists(TURN, max_size=3)) | JSON_VALUES)
def test_any_json_is_a_row_or_a_row_error(raw: Any) -> None:
    try:
        row = normalise(raw)
    except (RowError, RowFormatError):
        return
    if isinstance(row, Chat):
        assert any(message.role == "assistant" and message.content.strip() for message in row.messages)
        assert all(message.content.encode() is not None for message in row.messages)
    else:
        assert row.text.strip()


def test_a_number_that_is_nan_is_no_text() -> None:
    with pytest.raises(RowError, match="number"):
        normalise({"text": math.nan})
