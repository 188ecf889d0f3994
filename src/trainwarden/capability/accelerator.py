"""What the GPU can do: one verdict an ability, from what was tried in a process of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from trainwarden.capability.children import Errand, Report
from trainwarden.capability.machine import Machine, TorchBuild
from trainwarden.capability.verdict import NO_CUDA_FIX, Verdict, degraded, supported, unknown, unsupported

FP8_MULTIPLE = 16
"""Both dimensions of a layer must be divisible by this for an FP8 matrix product."""
FP8_RECIPE = "rowwise"
"""Torchao's recipe that is tried and trained with: a scale for each token, so that no token's product depends on which
others share its micro-batch, and a step that is finished in smaller ones stays the same step."""
CORE_TASKS = ("cuda", "bf16", "scaled_mm", "flash_attention")
TORCHAO_TASKS = ("import_torchao", "convert_with_torchao")
_MISMATCH = "Skipping import of cpp extensions"
"""What torchao prints when its compiled kernels belong to another torch; it goes on without them."""
_NO_TORCH = "torch is not installed"


@dataclass(frozen=True)
class Fp8Finding:
    """``half_installed``: torchao is there and cannot be imported, although the GPU could compute in FP8."""

    verdict: Verdict
    half_installed: bool = False


def without_gpu(machine: Machine) -> Verdict | None:
    """The verdict on all that needs a GPU where there certainly is none, found in milliseconds; None: to be tried."""
    build = machine.torch_build()
    if build is None:
        return unsupported(_NO_TORCH, "pip install torch")
    if not build.for_gpus:
        return unsupported(f"no CUDA: torch {build.version} is built without it", NO_CUDA_FIX)
    problem = machine.cuda_library_problem() if build.hip is None else None
    return None if problem is None else unsupported(f"no NVIDIA driver: {problem}", NO_CUDA_FIX)


def try_all(machine: Machine, deadline_s: float) -> dict[str, Verdict]:
    """``cuda`` and every ability of the GPU by its name, all tried at the same time in processes of their own."""
    impossible = without_gpu(machine)
    if impossible is not None:
        nothing = dict.fromkeys(("cuda", "bf16", "fp8", "flash_attention"), impossible)
        return {**nothing, "adam8bit": _adam8bit(machine, impossible)}
    errands = {"core": Errand(CORE_TASKS)}
    if machine.installed("torchao"):
        errands["torchao"] = Errand(TORCHAO_TASKS)
    if machine.installed("bitsandbytes"):
        errands["adam8bit"] = Errand(("adam8bit",))
    reports = dict(zip(errands, machine.run(list(errands.values()), deadline_s=deadline_s), strict=True))
    core = reports["core"].verdicts
    adam8bit = reports["adam8bit"].verdicts["adam8bit"] if "adam8bit" in reports else None
    return {
        "cuda": core["cuda"],
        "bf16": core["bf16"],
        "fp8": fp8(core["scaled_mm"], reports.get("torchao"), machine.torch_build()).verdict,
        "flash_attention": core["flash_attention"],
        "adam8bit": _adam8bit(machine, adam8bit),
    }


def try_fp8(machine: Machine, deadline_s: float) -> Fp8Finding:
    """FP8 alone, as a trainer asks for it."""
    impossible = without_gpu(machine)
    if impossible is not None:
        return Fp8Finding(impossible)
    torchao = [Errand(TORCHAO_TASKS)] if machine.installed("torchao") else []
    core, *rest = machine.run([Errand(("scaled_mm",)), *torchao], deadline_s=deadline_s)
    return fp8(core.verdicts["scaled_mm"], rest[0] if rest else None, machine.torch_build())


def fp8(scaled_mm: Verdict, torchao: Report | None, build: TorchBuild | None) -> Fp8Finding:
    """FP8 training needs the hardware first, then a torchao that imports and converts.

    Args:
        torchao: None where torchao is not installed.
    """
    if not scaled_mm.supported:
        return Fp8Finding(scaled_mm)
    if torchao is None:
        return Fp8Finding(unsupported("torchao is not installed", "pip install torchao", **scaled_mm.evidence))
    importing, converting = (torchao.verdicts[task] for task in TORCHAO_TASKS)
    evidence = {**scaled_mm.evidence, "torchao": importing.evidence.get("version")}
    version = build.version if build else "the installed version"
    reinstall = f"pip install --force-reinstall torchao, in the version that goes with torch {version}"
    if not importing.supported:
        reason = f"torchao cannot be imported: {importing.reason}"
        broken = unsupported(reason, reinstall, **evidence)
        if importing.status == "unsupported":
            return Fp8Finding(broken, half_installed=True)
        return Fp8Finding(unknown(reason, importing.fix, **evidence))
    if not converting.supported:
        reason = f"torchao converts no layer: {converting.reason}"
        return Fp8Finding(Verdict(converting.status, reason, reinstall, evidence))
    note = f"; its compiled kernels are not for torch {version}, torch's own are used" * (_MISMATCH in torchao.printed)
    return Fp8Finding(supported(f"{scaled_mm.reason}; {importing.reason}: {converting.reason}{note}", **evidence))


def fp8_layers(shapes: Iterable[tuple[int, int]]) -> Verdict:
    """Which linear layers, given as (in_features, out_features), can compute in FP8 at all."""
    layers = list(shapes)
    fitting = sum(
        in_features % FP8_MULTIPLE == 0 == out_features % FP8_MULTIPLE for in_features, out_features in layers
    )
    evidence: dict[str, Any] = {"layers": len(layers), "convertible": fitting}
    if fitting == 0:
        reason = f"none of {len(layers)} linear layers has both dimensions divisible by {FP8_MULTIPLE}"
        return unsupported(reason, "train in bf16", **evidence)
    if fitting < len(layers):
        rest = len(layers) - fitting
        reason = f"{rest} of {len(layers)} linear layers stay in bf16: a dimension is not divisible by {FP8_MULTIPLE}"
        return degraded(reason, **evidence)
    return supported(f"all {fitting} linear layers have dimensions divisible by {FP8_MULTIPLE}", **evidence)


def _adam8bit(machine: Machine, tried: Verdict | None) -> Verdict:
    """8-bit optimizers, which are bitsandbytes'; ``tried`` None: it is not installed."""
    if tried is None or not machine.installed("bitsandbytes"):
        return unsupported("bitsandbytes is not installed", "pip install bitsandbytes")
    return tried
