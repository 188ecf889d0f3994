from __future__ import annotations

from collections.abc import Iterator

import pytest

from .warm import Interpreter, Start, cold


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


@pytest.fixture
def start(interpreter: Interpreter, request: pytest.FixtureRequest) -> Start:
    """Starts scripts in forks of a warm interpreter, or in fresh ones where a test asks for ``"cold"``."""
    return cold if getattr(request, "param", "warm") == "cold" else interpreter.start
