"""Damage that the driver reports: which of it ends the run, and what has to be done about it.

Only what is new ends a run. What the first readable value of a sensor already shows was so when the run began: it is
told once. An unreadable sensor leaves its last verdict standing; it proves neither damage nor health.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from trainwarden.device import Missing, Reading, RecoveryAction, RemappedRows, Xid

GPUAction = Literal[
    "restart_job", "reset_gpu", "reboot_node", "recover_imex_domain", "inspect", "support", "return_card"
]
Condition = Literal[
    "lost", "reset_required", "uncorrectable_ecc", "row_remap_failed", "row_remap_pending", "recovery_action", "xid"
]
Severity = Literal["record", "warn", "abort"]

_GRAVITY: tuple[GPUAction, ...] = (
    "support",
    "restart_job",
    "inspect",
    "reset_gpu",
    "recover_imex_domain",
    "reboot_node",
    "return_card",
)

# By NVML's number. "Drain" lets the work at hand end: memory is still good, and a checkpoint of it too.
_RECOVERY: dict[int, tuple[GPUAction, bool]] = {
    1: ("reset_gpu", False),
    2: ("reboot_node", False),
    3: ("restart_job", True),
    4: ("reset_gpu", True),
    5: ("recover_imex_domain", False),
    6: ("reset_gpu", False),
    7: ("reboot_node", False),
}

_FATAL_WORKFLOWS = frozenset({48, 74})
"""Double-bit ECC and NVLink errors, for which DCGM fails a GPU. Other workflow Xids depend on what is not seen here."""
_FOLLOWS_ANOTHER = 45


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is wrong with a device."""

    condition: Condition
    severity: Severity
    action: GPUAction
    problem: str
    xid: int | None = None
    memory_trusted: bool = False
    """Whether what the device holds may still be saved as a checkpoint."""

    @property
    def gravity(self) -> int:
        """Orders findings by how much has to be done: the card's return is the most."""
        return _GRAVITY.index(self.action)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkup:
    """What one sample says of the health of one device; ``None`` is what could not be read."""

    lost: bool = False
    reset_required: bool = False
    ecc_uncorrected: int | None = None
    """Since the driver was loaded."""
    rows: RemappedRows | None = None
    recovery: RecoveryAction | None = None
    shared_card: bool = False
    """A MIG part: Xids of its card may be another tenant's."""
    xids: tuple[Xid, ...] = ()
    """New since the last checkup."""

    @classmethod
    def of(cls, reading: Reading, xids: Sequence[Xid] = ()) -> Checkup:
        """The part of ``reading`` that this machine looks at, and the ``xids`` that are new."""
        ecc, rows, recovery = reading.ecc_uncorrected_volatile, reading.remapped_rows, reading.recovery_action
        mig = reading.mig_enabled
        return cls(
            lost=reading.lost,
            reset_required=reading.reset_required,
            ecc_uncorrected=None if isinstance(ecc, Missing) else ecc,
            rows=None if isinstance(rows, Missing) else rows,
            recovery=None if isinstance(recovery, Missing) else recovery,
            shared_card=not isinstance(mig, Missing) and mig,
            xids=tuple(xids),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthState:
    """What is remembered: the last readable verdict by condition, the ECC count, and the Xids already told."""

    verdicts: dict[Condition, bool] = field(default_factory=dict)
    recovery_code: int = 0
    ecc_uncorrected: int | None = None
    xids_told: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class HealthPolicy:
    """Damage ends the run, or with ``abort=False`` is only told."""

    abort: bool = True

    def step(self, state: HealthState, checkup: Checkup) -> tuple[HealthState, tuple[Finding, ...]]:
        """The state after one checkup, and what is newly wrong."""
        found = [*_standing(state, checkup), *_ecc(state, checkup), *_xids(state, checkup)]
        rows, recovery = checkup.rows, checkup.recovery
        verdicts: dict[Condition, bool] = {"lost": checkup.lost, "reset_required": checkup.reset_required}
        if rows is not None:
            verdicts |= {"row_remap_failed": rows.failed, "row_remap_pending": rows.pending}
        if recovery is not None:
            verdicts["recovery_action"] = recovery.needed
        state = HealthState(
            verdicts={**state.verdicts, **verdicts},
            recovery_code=state.recovery_code if recovery is None else recovery.code,
            ecc_uncorrected=state.ecc_uncorrected if checkup.ecc_uncorrected is None else checkup.ecc_uncorrected,
            xids_told=state.xids_told | {xid.code for xid in checkup.xids},
        )
        return state, tuple(each if self.abort or each.severity != "abort" else _told(each) for each in found)


def xid_finding(xid: Xid, *, shared_card: bool = False) -> Finding:
    """What an Xid means for the run, by NVIDIA's classes. One that the table does not list is told, never acted on."""
    severity, action = _judge_xid(xid, shared_card)
    return Finding(
        condition="xid", severity=severity, action=action, problem=f"Xid {xid.code}: {xid.meaning}", xid=xid.code
    )


def _judge_xid(xid: Xid, shared_card: bool) -> tuple[Severity, GPUAction]:
    match xid.action:
        case "restart_job":
            # Errors of one program. On a shared card it may be another tenant's; ours would fail by itself.
            return "warn" if shared_card else "abort", "restart_job"
        case "reset_gpu":
            return "abort", "reset_gpu"
        case "reboot_node":
            return "abort", "reboot_node"
        case "inspect" if xid.code in _FATAL_WORKFLOWS:
            return "abort", "inspect"
        case "inspect" if xid.code == _FOLLOWS_ANOTHER:
            return "record", "inspect"
        case "support":
            return "warn", "support"
        case "record":
            return "record", "support"
        case _:
            return "warn", "inspect"


def _standing(state: HealthState, checkup: Checkup) -> Iterator[Finding]:
    """Conditions that hold or do not: lost, reset required, rows, the driver's recovery action."""
    if checkup.lost:
        yield from _if_new(state, "lost", "reboot_node", "the GPU is lost (fallen off the bus)")
    if checkup.reset_required:
        yield from _if_new(state, "reset_required", "reset_gpu", "the driver refuses to read it until it is reset")
    rows, recovery = checkup.rows, checkup.recovery
    if rows is not None and rows.failed:
        yield from _if_new(state, "row_remap_failed", "return_card", "a bad memory row could not be replaced")
    if rows is not None and rows.pending:
        pending = "bad memory rows are replaced at the next reset"
        yield from (_told(each) for each in _if_new(state, "row_remap_pending", "reset_gpu", pending))
    if recovery is not None and recovery.needed:
        action, trusted = _RECOVERY.get(recovery.code, ("inspect", False))
        if recovery.code != state.recovery_code:
            state = replace(state, verdicts={k: v and k != "recovery_action" for k, v in state.verdicts.items()})
        problem = f"the driver asks for recovery action {recovery}"
        yield from _if_new(state, "recovery_action", action, problem, trusted=trusted)


def _if_new(
    state: HealthState, condition: Condition, action: GPUAction, problem: str, *, trusted: bool = False
) -> Iterator[Finding]:
    before = state.verdicts.get(condition)
    if before:
        return
    finding = Finding(condition=condition, severity="abort", action=action, problem=problem, memory_trusted=trusted)
    yield finding if before is False else _told(replace(finding, problem=f"{problem}, already so when the run began"))


def _ecc(state: HealthState, checkup: Checkup) -> Iterator[Finding]:
    before, now = state.ecc_uncorrected, checkup.ecc_uncorrected
    if now is None or now == 0:
        return
    if before is None:
        problem = f"{now} uncorrectable ECC errors since the driver was loaded, already there when the run began"
        yield Finding(condition="uncorrectable_ecc", severity="warn", action="reset_gpu", problem=problem)
    elif now > before:
        errors = "error" if now - before == 1 else "errors"
        problem = f"{now - before} uncorrectable ECC {errors} during the run"
        yield Finding(condition="uncorrectable_ecc", severity="abort", action="reset_gpu", problem=problem)


def _xids(state: HealthState, checkup: Checkup) -> Iterator[Finding]:
    told = set(state.xids_told)
    for xid in checkup.xids:
        finding = xid_finding(xid, shared_card=checkup.shared_card)
        if finding.severity == "abort" or xid.code not in told:
            yield finding
        told.add(xid.code)


def _told(finding: Finding) -> Finding:
    return replace(finding, severity="warn") if finding.severity == "abort" else finding
