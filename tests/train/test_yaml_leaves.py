"""YAML as its writer meant it, with the line of every value."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwarden.train.yaml_leaves import YamlProblem, parse_leaves, parse_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),  # plain PyYAML makes text of it
        ("1.5e-4", 1.5e-4),
        ("5E3", 5000.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("-2", -2),
        ("010", 10),  # YAML 1.1: eight
        ("1_000", 1000),
        ("1:30", "1:30"),  # YAML 1.1: ninety
        ("no", "no"),  # YAML 1.1: false
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'8'", "8"),
        ('"null"', "null"),
        ("2026-11-20", "2026-11-20"),  # YAML 1.1: a date
        ("[q_proj, 'v_proj', 3]", ["q_proj", "v_proj", 3]),
        ("{a: {b: 1e-4}}", {"a": {"b": 1e-4}}),
        ("e5", "e5"),
        ("1e", "1e"),
        ("_1", "_1"),
        ("- 1", [1]),
        ("runs/a b", "runs/a b"),
    ],
)
def test_a_value_is_what_it_looks_like(text: str, value: Any) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_what_is_not_finite_is_a_number_so_that_it_can_be_refused_as_one() -> None:
    assert math.isnan(parse_value(".nan"))
    assert parse_value("-.inf") == -math.inf
    assert parse_value("1e999") == math.inf


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_number_python_prints_is_read_back(number: float) -> None:
    assert parse_value(repr(number)) == number


@given(st.integers())
def test_every_integer_is_read_back(number: int) -> None:
    assert parse_value(str(number)) == number


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None)
@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), VALUES, min_size=1, max_size=5))
def test_what_pyyaml_writes_is_read_back(tree: dict[str, Any]) -> None:
    # Everything quoted that may be: its plain style follows YAML 1.1.
    text = yaml.dump(tree, default_style='"') if _is_text(tree) else yaml.dump(tree)
    leaves = parse_leaves(text)
    assert {key: leaf.value for key, leaf in leaves.items()} == tree


def _is_text(tree: dict[str, Any]) -> bool:
    return all(isinstance(value, str) for value in tree.values())


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_with_a_reason(text: str) -> None:
    try:
        outcome: Any = parse_leaves(text)
    except YamlProblem as error:
        outcome = error.problem
    assert outcome


def test_leaves_have_dotted_keys_and_lines() -> None:
    text = "a: 1\nb:\n  c: x\n  d:\n    - 1\n    - 2\ne: {}\nf:\n"
    leaves = parse_leaves(text)
    assert {key: (leaf.value, leaf.line) for key, leaf in leaves.items()} == {
        "a": (1, 1),
        "b.c": ("x", 3),
        "b.d": ([1, 2], 5),
        "e": ({}, 7),
        "f": (None, 8),
    }


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("", None, "empty"),
        ("# only words\n", None, "empty"),
        ("- a\n- b\n", 1, "expected keys"),
        ("a: 1\nb: 2\na: 3\n", 3, "'a' is given twice, first in line 1"),
        ("a:\n  b: 1\n  b: 2\n", 3, "given twice"),
        ("a: [1\nb: 2\n", 2, ""),
        ("a: 1\n  b: 2\n", 2, ""),
        ("a: b: c\n", 1, ""),
        ("a: 1\n---\nb: 2\n", None, ""),
        ("a: *nothing\n", 1, "nothing"),
        ("a: &x [*x]\n", 1, "alias"),
        ("a: &x {b: *x}\n", 1, "alias"),
        ("a: !!python/object/apply:os.system ['true']\n", 1, "tag"),
        ("a: !mine 1\n", 1, "tag"),
        ("? [1, 2]\n: 3\n", 1, "plain text"),
        ("base: &b {x: 1}\na:\n  <<: *b\n", 3, "'<<'"),
        ("trainer.max_steps: 4\n", 1, "dot"),
        ("a: \x00\n", None, ""),
        ("\ta: 1\n", 1, ""),
    ],
)
def test_a_text_that_cannot_be_read_is_refused_with_its_line(text: str, line: int | None, problem: str) -> None:
    with pytest.raises(YamlProblem) as caught:
        parse_leaves(text)
    assert problem in caught.value.problem
    if line is not None:
        assert caught.value.line == line


def test_an_alias_is_its_value() -> None:
    leaves = parse_leaves("a: &x [1, 2]\nb: *x\n")
    assert leaves["b"].value == [1, 2]
