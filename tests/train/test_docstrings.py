"""The built-in data source: documented names of the standard library, parsed and never run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from trainwarden.errors import DatasetError
from trainwarden.train.docstrings import docstring_rows


@pytest.fixture(scope="module")
def rows() -> list[tuple[str, str]]:
    found = docstring_rows()
    return [(row.messages[0].content, row.messages[1].content) for row in found]


def test_it_gives_thousands_of_rows(rows: list[tuple[str, str]]) -> None:
    assert len(rows) > 2000


def test_a_known_function_is_asked_about_and_answered(rows: list[tuple[str, str]]) -> None:
    answers = dict(rows)
    assert answers["What does `textwrap.dedent` do?"].startswith("Remove any common leading whitespace")
    assert "What is the module `textwrap` for?" in answers
    assert "What is `argparse.ArgumentParser`?" in answers


def test_names_come_once(rows: list[tuple[str, str]]) -> None:
    assert len({question for question, _ in rows}) == len(rows)


@pytest.mark.parametrize("limit", [1, 25, 300])
def test_the_limit_takes_the_first_rows_of_a_fixed_order(rows: list[tuple[str, str]], limit: int) -> None:
    limited = docstring_rows(limit=limit)
    assert [(row.messages[0].content, row.messages[1].content) for row in limited] == rows[:limit]


def test_private_names_and_tests_are_left_out(rows: list[tuple[str, str]]) -> None:
    names = [question.split("`")[1] for question, _ in rows]
    assert not [name for name in names if any(part.startswith("_") for part in name.split("."))]
    assert not [name for name in names if name.startswith(("test.", "idlelib."))]


def test_answers_are_whole_paragraphs_of_bounded_length(rows: list[tuple[str, str]]) -> None:
    assert all(20 <= len(answer) <= 600 for _, answer in rows)


def test_sources_are_never_executed(tmp_path: Path) -> None:
    (tmp_path / "bomb.py").write_text(
        '"""A module that must not run, whatever it says."""\nraise SystemExit("executed")\n'
    )
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "nul.py").write_bytes(b'"""has a\0byte and is no source"""')
    (rows,) = docstring_rows(root=tmp_path)
    assert rows.messages[0].content == "What is the module `bomb` for?"
    assert "bomb" not in sys.modules


def test_a_tree_without_documented_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no documented Python source"):
        docstring_rows(root=tmp_path)


def test_classes_give_their_public_methods(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(
        "class Cart:\n"
        '    """What a customer wants to buy."""\n'
        "    def add(self, item):\n"
        '        """Put one more item into the cart."""\n'
        "    def _hidden(self):\n"
        '        """Nobody should ask about this one."""\n'
        "    def bare(self): ...\n"
    )
    questions = [row.messages[0].content for row in docstring_rows(root=tmp_path)]
    assert questions == ["What is `shop.Cart`?", "What does `shop.Cart.add` do?"]
