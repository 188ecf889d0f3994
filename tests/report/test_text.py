"""Numbers for people."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwarden.report import text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1.23456, "1.2346"),
        (0.0, "0.0000"),
        (math.nan, "NaN"),
        ("nan", "NaN"),
        ("-inf", "-inf"),
        (math.inf, "inf"),
        (None, "unknown"),
    ],
)
def test_nan_reads_nan_and_unknown_reads_unknown(value: text.Number, shown: str) -> None:
    assert text.number(value) == shown


def test_nothing_unknown_reads_like_a_number() -> None:
    unknown = [
        text.count(None),
        text.size(None),
        text.temperature(None),
        text.duration(None),
        text.word(None),
    ]
    assert set(unknown) == {"unknown"}
    assert text.duration("nan") == "unknown"


@pytest.mark.parametrize(("value_bytes", "shown"), [(0, "0.0 MiB"), (5 * 2**20, "5.0 MiB"), (3 * 2**29, "1.50 GiB")])
def test_sizes_are_in_powers_of_1024(value_bytes: int, shown: str) -> None:
    assert text.size(value_bytes) == shown


@pytest.mark.parametrize(
    ("value_s", "shown"), [(4.24, "4.2 s"), (59.99, "60.0 s"), (185, "3 min 05 s"), (7620.0, "2 h 07 min")]
)
def test_durations_are_in_words(value_s: float, shown: str) -> None:
    assert text.duration(value_s) == shown


def test_a_table_has_straight_columns_and_no_trailing_space() -> None:
    shown = text.table(("NAME", "N"), [("a", "1"), ("longer", "23")], frozenset({"N"}))
    assert shown == "NAME     N\na        1\nlonger  23"


def test_a_table_without_rows_is_its_header() -> None:
    assert text.table(("NAME", "N"), []) == "NAME  N"


@given(st.lists(st.tuples(st.text("ab ", min_size=1, max_size=9), st.text("xy", min_size=1)), min_size=1))
def test_the_values_of_pairs_stand_in_one_column(rows: list[tuple[str, str]]) -> None:
    column = 4 + max(len(label) for label, _ in rows)
    for line, (_, value) in zip(text.pairs(rows).split("\n"), rows, strict=True):
        assert line[column:] == value
