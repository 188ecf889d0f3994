"""Exit statuses for those who branch on another table: one mapping per profile, applied at the command line.

The mapping depends on the code alone. Inside a process, and in JSON, the status is that of `EXIT_STATUSES`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from .base import WardenError
from .inputs import UsageError
from .internal import InternalError

PROFILE_VARIABLE = "WARDEN_EXIT_PROFILE"


class ExitProfile(StrEnum):
    """Whose exit statuses the command line speaks."""

    WARDEN = "warden"
    BACKPROPAGATE = "backpropagate"
    GENOLEWM = "genolewm"


_BY_FAMILY: Mapping[ExitProfile, Mapping[str, int]] = MappingProxyType(
    {
        # 1 user, 2 runtime, 3 partial
        ExitProfile.BACKPROPAGATE: {
            "INPUT_": 1,
            "CONFIG_": 1,
            "PREFLIGHT_": 1,
            "UI_": 1,
            "DEP_": 2,
            "PEFT_": 2,
            "RUNTIME_": 2,
            "SLAO_": 2,
            "STATE_": 2,
            "PROVENANCE_": 2,
            "INTERNAL_": 2,
            "PARTIAL_": 3,
            "GATE_": 65,
        },
        # 2 input, 3 config, 4 resource, 5 training, 6 evaluation, 7 deployment, 8 provenance, 9 internal
        ExitProfile.GENOLEWM: {
            "INPUT_": 2,
            "CONFIG_": 3,
            "PREFLIGHT_": 3,
            "UI_": 3,
            "DEP_": 4,
            "PEFT_": 4,
            "STATE_": 4,
            "RUNTIME_": 5,
            "SLAO_": 5,
            "PARTIAL_": 5,
            "GATE_": 6,
            "PROVENANCE_": 8,
            "INTERNAL_": 9,
        },
    }
)
_BY_CODE: Mapping[ExitProfile, Mapping[str, int]] = MappingProxyType(
    {
        # Its table gives out-of-memory the status of a process that the kernel killed for memory.
        ExitProfile.BACKPROPAGATE: {
            "RUNTIME_GPU_OOM": 137,
            "RUNTIME_SPLIT_REFUSED": 137,
            "RUNTIME_EVAL_GATE_REGRESSED": 65,
        },
        ExitProfile.GENOLEWM: {
            "RUNTIME_GPU_OOM": 4,
            "RUNTIME_SPLIT_REFUSED": 4,
            "RUNTIME_DISK_FULL": 4,
            "RUNTIME_TRAINING_ABORTED": 130,
            "RUNTIME_EVAL_GATE_REGRESSED": 6,
            "STATE_RUN_EXISTS": 3,
            "STATE_RUN_LOCKED": 3,
        },
    }
)
_INTERRUPTED = 130


def exit_status(error: BaseException | type[WardenError], profile: ExitProfile | str | None = None) -> int:
    """The exit status for `error` (or a condition) in `profile`, by default our own table.

    An exception that is not ours counts as `InternalError`, a bare `KeyboardInterrupt` as forced: 130.
    """
    if isinstance(error, KeyboardInterrupt):
        return _INTERRUPTED
    condition = error if isinstance(error, type) else type(error)
    if not issubclass(condition, WardenError):
        condition = InternalError
    profile = ExitProfile(profile or ExitProfile.WARDEN)
    if profile is ExitProfile.WARDEN:
        return condition.exit_code
    override = _BY_CODE[profile].get(condition.code)
    family = condition.code.partition("_")[0] + "_"
    return override if override is not None else _BY_FAMILY[profile][family]


def resolve_profile(flag: str | None) -> ExitProfile:
    """The profile of `--exit-profile`, else of `WARDEN_EXIT_PROFILE`, else our own.

    Raises UsageError for an unknown one, naming the known ones.
    """
    name = flag if flag is not None else os.environ.get(PROFILE_VARIABLE) or ExitProfile.WARDEN
    try:
        return ExitProfile(name.strip().lower())
    except ValueError as error:
        source = "" if flag is not None else f" in {PROFILE_VARIABLE}"
        known = ", ".join(ExitProfile)
        raise UsageError(problem=f"unknown exit profile '{name}'{source}; known are {known}") from error
