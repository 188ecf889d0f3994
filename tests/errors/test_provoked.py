"""The reader that the contract test relies on: strict where it counts, not brittle elsewhere."""

from __future__ import annotations

import ast

import pytest

from trainwarden.errors import registry

from .provoked import provoked_in, raised_in


@pytest.mark.parametrize(
    "source",
    [
        "raise LedgerError(path='x')",
        "raise errors.LedgerError(path='x') from why",
        "def f():\n    raise LedgerError().add_context(run_id='r')",
        "def f():\n    return LedgerError()",
        "def f():\n    error = LedgerError()\n    if x:\n        raise error",
        "def f():\n    error: WardenError = LedgerError()\n    raise error from None",
        "def f():\n    raise (LedgerError() if a else DatasetError())",
    ],
)
def test_what_is_raised_or_made_to_be_raised_counts(source: str) -> None:
    assert "LedgerError" in raised_in(ast.parse(source))


@pytest.mark.parametrize(
    "source",
    [
        "from trainwarden.errors import LedgerError",
        "try:\n    f()\nexcept LedgerError:\n    raise",
        "def f():\n    error = LedgerError()\n    raise DatasetError()",
        "def f():\n    error = LedgerError()\ndef g(error):\n    raise error",
        "'raise LedgerError()'",
        "isinstance(error, LedgerError)",
    ],
)
def test_what_is_only_mentioned_does_not_count(source: str) -> None:
    assert "LedgerError" not in raised_in(ast.parse(source))


@pytest.mark.parametrize(
    "source",
    [
        "with pytest.raises(LedgerError): f()",
        "with pytest.raises((DatasetError, errors.LedgerError), match='x') as caught: f()",
        "assert error.code == 'STATE_LEDGER_INVALID'",
        "assert 'STATE_LEDGER_INVALID' in result.stderr",
        "assert isinstance(error, LedgerError)",
        "assert type(error) is LedgerError",
    ],
)
def test_a_raises_block_and_an_assertion_provoke(source: str) -> None:
    assert "STATE_LEDGER_INVALID" in provoked_in(ast.parse(source), registry())


@pytest.mark.parametrize(
    "source",
    [
        "with pytest.raises(DatasetError, match='LedgerError'): f()",
        "error = LedgerError()",
        "print('STATE_LEDGER_INVALID')",
        "# with pytest.raises(LedgerError)",
    ],
)
def test_a_mention_in_a_test_does_not_provoke(source: str) -> None:
    assert "STATE_LEDGER_INVALID" not in provoked_in(ast.parse(source), registry())
