"""Test conditions of our own, registered for one test only."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from trainwarden.errors import registry as _public_registry
from trainwarden.errors.registry import _classes, _names


@pytest.fixture
def scratch_registry() -> Iterator[None]:
    """Whatever a test registers is forgotten afterwards."""
    classes, names = dict(_classes), dict(_names)
    yield
    _classes.clear()
    _classes.update(classes)
    _names.clear()
    _names.update(names)
    assert dict(_public_registry()) == classes
