"""`Verdict`: what was found out about one ability, with the reason, the way out and the evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NoReturn

NO_CUDA_FIX = "check `nvidia-smi`; install a CUDA build of torch that matches the driver"


class Status(StrEnum):
    """``DEGRADED`` works, but less well than asked for; ``UNKNOWN`` could not be tried and is never health."""

    SUPPORTED = "supported"
    DEGRADED = "degraded"
    UNSUPPORTED = "unsupported"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether this machine and installation can do something.

    It has no truth value (TypeError): "degraded" and "unknown" are neither yes nor no, ask `supported`.
    """

    status: Status
    reason: str
    """One clause that a person can read; always there."""
    fix: str = ""
    """What to do about it; empty when there is nothing to do."""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """JSON values that were measured on the way: device, versions, sizes in bytes."""

    @property
    def supported(self) -> bool:
        return self.status is Status.SUPPORTED

    def to_dict(self) -> dict[str, Any]:
        return {"status": str(self.status), "reason": self.reason, "fix": self.fix, "evidence": dict(self.evidence)}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Verdict:
        """The inverse of `to_dict`."""
        status = Status(document["status"])
        return cls(status, document["reason"], document.get("fix", ""), dict(document.get("evidence", {})))

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}"

    def __bool__(self) -> NoReturn:
        raise TypeError(f"a verdict ({self}) is neither true nor false: ask for .supported")


def supported(reason: str, **evidence: Any) -> Verdict:
    return Verdict(Status.SUPPORTED, reason, "", evidence)


def degraded(reason: str, fix: str = "", **evidence: Any) -> Verdict:
    return Verdict(Status.DEGRADED, reason, fix, evidence)


def unsupported(reason: str, fix: str = "", **evidence: Any) -> Verdict:
    return Verdict(Status.UNSUPPORTED, reason, fix, evidence)


def unknown(reason: str, fix: str = "", **evidence: Any) -> Verdict:
    return Verdict(Status.UNKNOWN, reason, fix, evidence)
