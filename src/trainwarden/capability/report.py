"""`probe`: everything at once, and the report of it for people, programs and GitHub."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainwarden.capability import accelerator, distributed, services
from trainwarden.capability.machine import Machine
from trainwarden.capability.quantities import Quantity, Readings, quantities
from trainwarden.capability.requirements import Outcome, judge, parse_requirements
from trainwarden.capability.verdict import Verdict
from trainwarden.errors import RequirementUnmetError

DEADLINE_S = 60.0
"""How long one trial may take before its verdict is unknown. A cold torch on a network disk needs tens of seconds."""


@dataclass(frozen=True)
class ProbeReport:
    """What this machine and installation offer to a run."""

    verdicts: Mapping[str, Verdict]
    quantities: Mapping[str, Quantity]
    outcomes: Sequence[Outcome] = ()
    """Of the requirements, in their order."""
    took_s: float = 0.0

    @property
    def unmet(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if not outcome.met]

    def require(self) -> None:
        """Raises `RequirementUnmetError` (exit 69) with every requirement that is not met, if there is one."""
        if not self.unmet:
            return
        raise RequirementUnmetError(
            unmet_count=len(self.unmet),
            required_count=len(self.outcomes),
            problem="; ".join(str(outcome) for outcome in self.unmet),
            unmet=[outcome.to_dict() for outcome in self.unmet],
            report=self.to_dict(),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON: ``abilities``, ``quantities``, ``requirements``, ``met`` (null: none asked), ``took_s``."""
        return {
            "abilities": {name: verdict.to_dict() for name, verdict in self.verdicts.items()},
            "quantities": {name: quantity.to_dict() for name, quantity in self.quantities.items()},
            "requirements": [outcome.to_dict() for outcome in self.outcomes],
            "met": not self.unmet if self.outcomes else None,
            "took_s": self.took_s,
        }

    def ability_rows(self) -> list[tuple[str, str]]:
        """Name and verdict of each ability, with the fix where there is one."""
        return [(name, _with_fix(str(one), one.fix)) for name, one in self.verdicts.items()]

    def quantity_rows(self) -> list[tuple[str, str]]:
        """Name and amount of each quantity, with where it was read."""
        return [(name, f"{one.found}: {one.reason}") for name, one in self.quantities.items()]

    def requirement_rows(self) -> list[tuple[str, str]]:
        """Each requirement and how it came out."""
        rows = []
        for one in self.outcomes:
            rows.append((str(one.requirement), _with_fix(f"{one.status}: found {one.found} ({one.reason})", one.fix)))
        return rows

    def github_lines(self) -> list[str]:
        """One ``::error`` workflow command for each requirement that is not met; a runner shows them on the job."""
        return [
            f"::error title={_property(f'{one.requirement} is {one.status}')}::"
            f"{_data(_with_fix(f'found {one.found}: {one.reason}', one.fix))}"
            for one in self.unmet
        ]


def probe(
    requirements: Sequence[str] = (),
    *,
    machine: Machine | None = None,
    place: Path = Path(),
    deadline_s: float = DEADLINE_S,
) -> ProbeReport:
    """Try out what this machine can do. Nothing runs on the GPU in this process, which stays free of torch.

    Without a driver nothing needs to be tried, and it takes a second at most. With one, every trial starts CUDA for
    itself, all at the same time, and then one process a GPU joins the others.

    Args:
        requirements: see `parse_requirements`; they are parsed before anything is tried.
        machine: the boundary, for tests.
        place: where free disk space matters.
        deadline_s: of each of the two rounds of trials.

    Raises:
        InvalidSettingError: a requirement cannot be understood. What is found raises nothing: see
            `ProbeReport.require`.
    """
    asked = parse_requirements(requirements)
    machine = machine or Machine()
    began_s = time.monotonic()
    with ThreadPoolExecutor(4, thread_name_prefix="trainwarden-probe") as threads:
        reading = threads.submit(Readings.take, machine, place)
        around = {
            name: threads.submit(ask, machine)
            for name, ask in {"hub": services.hub, "ollama": services.ollama, "mlx": services.mlx}.items()
        }
        verdicts = accelerator.try_all(machine, deadline_s)
        readings = reading.result()
        cuda = verdicts["cuda"]
        ranks = _try_ranks(machine, cuda, deadline_s)
        verdicts |= {
            "nccl": ranks["nccl"],
            "fsdp": distributed.offload(ranks["fsdp"], readings.memory.available_bytes),
            **{name: one.result() for name, one in around.items()},
        }
    amounts = quantities(readings, cuda)
    outcomes = [judge(one, verdicts, amounts) for one in asked]
    return ProbeReport(verdicts, amounts, outcomes, round(time.monotonic() - began_s, 3))


def _try_ranks(machine: Machine, cuda: Verdict, deadline_s: float) -> dict[str, Verdict]:
    if not cuda.supported:
        return {"nccl": cuda, "fsdp": cuda}
    return distributed.try_ranks(machine, ranks_here=len(cuda.evidence["devices"]), deadline_s=deadline_s)


def _with_fix(text: str, fix: str) -> str:
    return f"{text}; {fix}" if fix else text


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
