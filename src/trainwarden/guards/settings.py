"""Policies refuse values that make no sense, in one manner."""

from __future__ import annotations

from trainwarden.errors import InvalidSettingError


def require(policy: str, condition: bool, setting: str, value: object, expected: str) -> None:
    """Raises InvalidSettingError about ``policy.setting`` unless ``condition`` holds."""
    if not condition:
        raise InvalidSettingError(setting=f"{policy}.{setting}", value=value, expected=expected)
