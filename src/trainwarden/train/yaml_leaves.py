"""YAML into leaves: dotted keys with their values and line numbers, without the surprises of YAML 1.1.

``1e-4`` is a number, ``no`` and ``off`` are words, ``010`` is ten and ``1:30`` is text. A key given twice is
refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

_INTEGER = re.compile(r"[-+]?[0-9][0-9_]*")
_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", "+.inf", "inf", "+inf"), float("inf")),
    **dict.fromkeys(("-.inf", "-inf"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", "nan", "NaN"), float("nan")),
}
_STANDARD_TAG = "tag:yaml.org,2002:"
_DEPTH_LIMIT = 16
"""Deeper than any configuration; an alias that contains itself has no bottom."""


@dataclass(frozen=True)
class Leaf:
    """A value that is no mapping (or an empty one), and the line, from 1, that it stands on."""

    value: Any
    line: int


class YamlProblem(Exception):  # noqa: N818 - not an error of the contract: its catchers make one of it
    """Why a text cannot be read, and on which line, where that is known."""

    def __init__(self, problem: str, line: int | None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.line = line


def parse_leaves(text: str) -> dict[str, Leaf]:
    """The leaves of a document whose top is a mapping, by dotted key, in its order.

    Raises:
        YamlProblem: the text is not YAML, not one mapping, or holds a key twice.
    """
    node = _compose(text)
    if node is None:
        raise YamlProblem("the file is empty", None)
    if not isinstance(node, yaml.MappingNode):
        raise YamlProblem("expected keys with values at the top level", _line(node))
    return dict(_leaves(node, "", 0))


def parse_value(text: str) -> Any:
    """The value that a text such as ``1e-4``, ``[q_proj, v_proj]`` or ``{a: 1}`` stands for.

    Raises:
        YamlProblem: it stands for none.
    """
    node = _compose(text)
    return None if node is None else _value(node, 0)


def _compose(text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlProblem(error.problem or "not YAML", None if mark is None else mark.line + 1) from error
    except yaml.YAMLError as error:
        raise YamlProblem(str(error).splitlines()[0], None) from error


def _leaves(node: yaml.MappingNode, prefix: str, depth: int) -> Iterator[tuple[str, Leaf]]:
    for key, value_node in _entries(node, depth):
        if isinstance(value_node, yaml.MappingNode) and value_node.value:
            yield from _leaves(value_node, f"{prefix}{key}.", depth + 1)
        else:
            yield prefix + key, Leaf(_value(value_node, depth + 1), _line(value_node))


def _value(node: yaml.Node, depth: int) -> Any:
    _check(node, depth)
    if isinstance(node, yaml.MappingNode):
        return {key: _value(value, depth + 1) for key, value in _entries(node, depth)}
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, depth + 1) for item in node.value]
    quoted = isinstance(node, yaml.ScalarNode) and node.style is not None
    return node.value if quoted else _scalar(node.value)


def _scalar(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text.replace("_", ""))
    return float(text.replace("_", "")) if _FLOAT.fullmatch(text) else text


def _entries(node: yaml.MappingNode, depth: int) -> Iterator[tuple[str, yaml.Node]]:
    _check(node, depth)
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode) or key_node.value == "<<":
            raise YamlProblem("a key is plain text; '<<' and keys with parts are not read", _line(key_node))
        key = key_node.value
        if "." in key:
            raise YamlProblem(f"the key {key!r} has a dot; nest its parts instead", _line(key_node))
        if key in seen:
            raise YamlProblem(f"the key {key!r} is given twice, first in line {seen[key]}", _line(key_node))
        seen[key] = _line(key_node)
        yield key, value_node


def _check(node: yaml.Node, depth: int) -> None:
    if depth > _DEPTH_LIMIT:
        raise YamlProblem("nested too deeply, or an alias that contains itself", _line(node))
    if not node.tag.startswith(_STANDARD_TAG) or node.tag.startswith(f"{_STANDARD_TAG}python"):
        raise YamlProblem(f"the tag {node.tag} is not read", _line(node))


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
