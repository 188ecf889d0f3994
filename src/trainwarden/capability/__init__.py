"""What this machine and installation can do, found out by doing it: verdicts, requirements, gates.

What may print, hang or crash (CUDA, torchao, bitsandbytes, NCCL) is tried in processes of its own with a deadline, so
that importing or asking this room neither starts CUDA nor imports torch.
"""

from trainwarden.capability.accelerator import FP8_MULTIPLE, FP8_RECIPE, fp8_layers
from trainwarden.capability.gates import (
    check_fp8_settings,
    require_backend,
    require_fp8,
    require_fsdp_offload,
    require_quantized,
)
from trainwarden.capability.machine import Machine
from trainwarden.capability.quantities import Quantity
from trainwarden.capability.report import ProbeReport, probe
from trainwarden.capability.requirements import Outcome, Requirement, parse_requirement, parse_requirements
from trainwarden.capability.verdict import Status, Verdict

__all__ = [
    "FP8_MULTIPLE",
    "FP8_RECIPE",
    "Machine",
    "Outcome",
    "ProbeReport",
    "Quantity",
    "Requirement",
    "Status",
    "Verdict",
    "check_fp8_settings",
    "fp8_layers",
    "parse_requirement",
    "parse_requirements",
    "probe",
    "require_backend",
    "require_fp8",
    "require_fsdp_offload",
    "require_quantized",
]
