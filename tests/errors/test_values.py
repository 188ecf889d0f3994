"""Details become JSON, and JSON becomes words; nothing on the way may fail."""

from __future__ import annotations

import json
import math
from enum import Enum
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwarden.errors.values import bytes_in_words, fill, finite, jsonable, placeholders, plain


class Colour(Enum):
    RED = "red"


class Hostile:
    def __str__(self) -> str:
        raise RuntimeError("no")

    def __index__(self) -> int:
        raise ValueError("no")


class HostileDict(dict):  # type: ignore[type-arg]
    def items(self):  # type: ignore[no-untyped-def]
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Path("a/b"), "a/b"),
        (Colour.RED, "red"),
        ((1, (2, "x")), [1, [2, "x"]]),
        ({3, 1, 2}, [1, 2, 3]),
        ({1: "one", Path("p"): None}, {"1": "one", "p": None}),
        (np.float32(0.5), "0.5"),
        (np.float64(0.5), 0.5),
        (np.int64(7), 7),
        (True, True),
        (Fraction(1, 3), "1/3"),
        (b"raw", "b'raw'"),
        (Hostile(), "<unprintable Hostile>"),
        (ValueError("why"), "why"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_json_lacks_become_their_nearest_json(value: object, expected: object) -> None:
    assert jsonable(value) == expected
    assert type(jsonable(value)) is type(expected)


def test_a_structure_that_contains_itself_ends() -> None:
    loop: list[object] = []
    loop.append(loop)
    assert json.dumps(jsonable(loop)).count("[") < 20


def test_a_mapping_that_fails_while_being_read_becomes_text() -> None:
    assert jsonable(HostileDict(a=1)) == "{'a': 1}"


def test_long_texts_of_foreign_objects_are_cut_and_huge_integers_stay_printable() -> None:
    assert len(jsonable(Fraction(10**4000, 7))) < 2100
    json.dumps(jsonable(1 << 100_000))


def test_a_text_is_kept_whole() -> None:
    assert jsonable("x" * 5000) == "x" * 5000


@given(st.floats())
def test_a_float_stays_a_float_until_it_is_written(value: float) -> None:
    assert isinstance(jsonable(value), float)
    written = finite({"a": [value]})["a"][0]
    assert written == value if math.isfinite(value) else isinstance(written, str)


@pytest.mark.parametrize(
    ("details", "sentence"),
    [
        ({"path": "a", "line": 3, "problem": "p"}, "a, line 3: p"),
        ({"path": "a", "line": None, "problem": "p"}, "a: p"),
        ({"path": "a", "problem": "p"}, "a: p"),
        ({}, "unknown: unknown"),
        (
            {"path": "{line}", "line": "[x]", "problem": "{problem} {0} %s"},
            "{line}, line [x]: {problem} {0} %s",
        ),
    ],
)
def test_a_template_drops_bracketed_parts_that_are_unknown(details: dict[str, object], sentence: str) -> None:
    assert fill("{path}[, line {line}]: {problem}", details) == sentence


def test_placeholders_are_found_inside_and_outside_brackets() -> None:
    assert placeholders("{a}[ and {b}] {a}") == {"a", "b"}


@given(st.dictionaries(st.sampled_from(["a", "b", "c"]), st.text() | st.none() | st.floats() | st.lists(st.text())))
def test_filling_a_template_never_fails(details: dict[str, object]) -> None:
    assert fill("{a}[ of {b}] {c}", {name: jsonable(value) for name, value in details.items()})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "unknown"),
        ([], "none"),
        (["a", "b"], "a, b"),
        (["a, b", "c"], "a, b; c"),
        ({}, "none"),
        ({"lr": {"saved": 0.1, "now": 0.2}, "seed": 3}, "lr (saved 0.1, now 0.2); seed 3"),
        (False, "False"),
    ],
)
def test_values_are_spelled_for_people(value: object, words: str) -> None:
    assert plain(value) == words


def test_sizes_get_a_unit_from_the_name_of_their_detail() -> None:
    assert fill("{free_bytes} of {total}", {"free_bytes": 1536, "total": 1536}) == "1.50 KiB of 1536"
    assert plain(None, unit_of="free_bytes") == "unknown"


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.00 KiB"),
        (3 * 2**30, "3.00 GiB"),
        (2**70, "1048576.00 PiB"),
    ],
)
def test_sizes_in_words(size: int, words: str) -> None:
    assert bytes_in_words(size) == words
