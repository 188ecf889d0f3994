"""A preflight is a list of findings: all rules are evaluated, and everything they found is said at once.

A finding is one condition of the error contract that has not happened yet: its code, message and fix are those of the
error class; severity and place are added here. Findings of severity ``error`` that nobody waived refuse the run, with
one `PreflightRefusedError` that carries all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

from .base import WardenError
from .explain import lookup
from .memory import PreflightRefusedError
from .redaction import cleaned
from .values import JSON


class Severity(StrEnum):
    """What a finding does, in the words that SARIF and GitHub have for it."""

    ERROR = "error"
    """Refuses the run unless it is waived."""
    WARNING = "warning"
    """May go wrong; refuses nothing."""
    NOTE = "note"
    """Worth knowing."""


_GITHUB_COMMANDS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.NOTE: "notice"}


class Finding(NamedTuple):
    """One thing that a rule has found. ``place``: the file, the setting or the device that it is about."""

    condition: WardenError
    severity: Severity
    place: str
    waived: bool = False

    @property
    def code(self) -> str:
        return self.condition.code

    @property
    def message(self) -> str:
        return self.condition.message

    @property
    def fix(self) -> str:
        return self.condition.suggestion

    @property
    def refuses(self) -> bool:
        return self.severity is Severity.ERROR and not self.waived

    def to_dict(self) -> dict[str, JSON]:
        """JSON, redacted: ``severity, code, place, message, fix, waived, details``."""
        return cleaned(
            {
                "severity": str(self.severity),
                "code": self.code,
                "place": self.place,
                "message": self.message,
                "fix": self.fix,
                "waived": self.waived,
                "details": dict(self.condition.details),
            }
        )

    def __str__(self) -> str:
        said = cleaned({"place": self.place, "message": self.message})
        label = f"{self.severity} (waived)" if self.waived else str(self.severity)
        return f"{label} {self.code} at {said.get('place', '(withheld)')}: {said.get('message', '(withheld)')}"


class Findings:
    """Everything that a preflight found, worst first, in the order of the rules."""

    def __init__(self, items: Iterable[Finding] = ()) -> None:
        self.items: tuple[Finding, ...] = tuple(items)

    @classmethod
    def of(cls, found: Iterable[Finding]) -> Findings:
        return cls(sorted(found, key=lambda finding: list(Severity).index(finding.severity)))

    def waive(self, codes: Iterable[str]) -> Findings:
        """The same findings, those with one of these codes (or aliases, in any case) marked as waived.

        Raises UnknownCodeError for a code that does not exist: a waiver with a typing error waives nothing. A code that
        was not found this time is no error, so that a waiver may stay in a script.
        """
        waived = {lookup(code).code for code in codes}
        return Findings(finding._replace(waived=finding.code in waived) for finding in self.items)

    @property
    def refusing(self) -> list[Finding]:
        return [finding for finding in self.items if finding.refuses]

    def require(self, report: Mapping[str, JSON] | None = None) -> None:
        """Raises PreflightRefusedError (exit 78) with all findings and ``report``, if any of them refuses the run."""
        refusing = self.refusing
        if not refusing:
            return
        raise PreflightRefusedError(
            refusing_count=len(refusing),
            findings_count=len(self.items),
            problem="; ".join(f"{finding.code}: {finding.message}" for finding in refusing),
            findings=self.to_dicts(),
            report=dict(report or {}),
            suggestion=" ".join(dict.fromkeys(finding.fix for finding in refusing)) + _waiver(refusing),
        )

    def to_dicts(self) -> list[dict[str, JSON]]:
        return [finding.to_dict() for finding in self.items]

    def github_lines(self) -> list[str]:
        """One workflow command for each finding; a runner shows them on the job. A waived error is a notice."""
        return [_github_line(finding) for finding in self.items]

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


def _waiver(refusing: Sequence[Finding]) -> str:
    codes = dict.fromkeys(finding.code for finding in refusing)
    return f" If you know better: {' '.join(f'--waive {code}' for code in codes)}."


def _github_line(finding: Finding) -> str:
    severity = Severity.NOTE if finding.waived else finding.severity
    said = cleaned({"place": finding.place, "text": f"{finding.message}. {finding.fix}"})
    title = _property(f"{finding.code} at {said.get('place', '(withheld)')}")
    return f"::{_GITHUB_COMMANDS[severity]} title={title}::{_data(str(said.get('text', '(withheld)')))}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
