"""What a trainer asks before it loads a model: go on, go on with less and say why, or the typed error."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

from trainwarden.capability import accelerator, distributed, services
from trainwarden.capability.children import Errand
from trainwarden.capability.machine import Machine
from trainwarden.capability.verdict import Verdict, degraded
from trainwarden.errors import (
    FP8UnsupportedError,
    FSDPUnavailableError,
    InvalidSettingError,
    MLXUnavailableError,
    QuantizationUnavailableError,
)
from trainwarden.events import Notice, announce

DEADLINE_S = 120.0
Warn = Callable[[str], None]
Quantized = Literal["nf4", "adam8bit"]
_WORDS: Mapping[Quantized, str] = {"nf4": "4-bit weights", "adam8bit": "8-bit optimizer states"}


def tell(sentence: str) -> None:
    """The default way to warn: one line on stderr."""
    announce(Notice(step=0, text=sentence))


def require_fp8(
    *,
    mode: str = "lora",
    method: str = "sft",
    load_in_4bit: bool = False,
    machine: Machine | None = None,
    warn: Warn = tell,
    deadline_s: float = DEADLINE_S,
) -> Verdict:
    """Whether to train in FP8 (``supported``) or in bf16 instead (``degraded``, after one warning with the reason).

    A missing GPU, one without FP8 units, a missing torchao and a conversion that fails all train correctly in bf16.
    A torchao that is there and cannot be imported does not pass silently: whoever installed it expects FP8, and other
    packages that import it break as well.

    Raises:
        InvalidSettingError: FP8 together with ``mode="full"``, another method than ``sft``, or 4-bit weights.
        FP8UnsupportedError: the GPU computes in FP8 and the installed torchao cannot be imported.
    """
    check_fp8_settings(mode=mode, method=method, load_in_4bit=load_in_4bit)
    finding = accelerator.try_fp8(machine or Machine(), deadline_s)
    verdict = finding.verdict
    if finding.half_installed:
        raise FP8UnsupportedError(problem=verdict.reason, suggestion=f"{verdict.fix}; or train with fp8=False.")
    if verdict.supported:
        return verdict
    warn(f"FP8 cannot be used, training in bf16: {verdict.reason}")
    return degraded(f"bf16 instead of FP8: {verdict.reason}", verdict.fix, **verdict.evidence)


def require_fsdp_offload(
    *,
    parameters: int | None = None,
    machine: Machine | None = None,
    backend: str = "nccl",
    deadline_s: float = DEADLINE_S,
) -> Verdict:
    """That full fine-tuning with FSDP2 and CPU offload can run, at the world size of this run.

    Under a launcher (torchrun) every rank must call this at the same point: they try it together, and when the host of
    any rank has too little memory all of them raise.

    Args:
        parameters: of the whole model; None leaves host memory unchecked.
        backend: ``nccl``; ``gloo`` rehearses it on the CPU.

    Raises:
        FSDPUnavailableError: something that it needs is missing. It never goes on without offload.
    """
    machine = machine or Machine()
    needed_bytes = None if parameters is None else distributed.host_bytes_needed(parameters, machine.environ)
    available_bytes = machine.host_memory().available_bytes
    enough = needed_bytes is None or needed_bytes <= available_bytes
    tried = distributed.try_ranks(
        machine, ranks_here=1, deadline_s=deadline_s, backend=backend, enough_host_memory=enough
    )
    verdict = tried["fsdp"]
    if verdict.supported:
        short = distributed.short_of_memory(tried["nccl"], needed_bytes, available_bytes)
        verdict = verdict if short is None else short
    if not verdict.supported:
        raise FSDPUnavailableError(
            problem=verdict.reason, needed_bytes=needed_bytes, available_bytes=available_bytes, fix=verdict.fix or None
        )
    return distributed.offload(verdict, available_bytes)


def require_quantized(
    wanted: Sequence[Quantized], *, on_cpu: bool, machine: Machine | None = None, deadline_s: float = DEADLINE_S
) -> dict[Quantized, Verdict]:
    """That bitsandbytes packs weights (``nf4``) or keeps optimizer states in 8 bits (``adam8bit``) on this device.

    All that is wanted is tried in one process of its own, so that nothing is started in this one.

    Args:
        on_cpu: where the run is to be; else on the GPU, if there is a usable one.

    Raises:
        QuantizationUnavailableError: bitsandbytes is missing, or does not do it here.
    """
    machine = machine or Machine()
    cpu = on_cpu or accelerator.without_gpu(machine) is not None
    device = "cpu" if cpu else "cuda"
    if not machine.installed("bitsandbytes"):
        what = _WORDS[wanted[0]]
        raise QuantizationUnavailableError(
            what=what, device=device, problem="bitsandbytes is not installed", fix="pip install bitsandbytes"
        )
    tasks = {one: f"{one}_on_cpu" if cpu else one for one in wanted}
    (report,) = machine.run([Errand(list(tasks.values()))], deadline_s=deadline_s)
    found = {one: report.verdicts[task] for one, task in tasks.items()}
    for one, verdict in found.items():
        if not verdict.supported:
            raise QuantizationUnavailableError(
                what=_WORDS[one], device=device, problem=verdict.reason, fix=verdict.fix or None
            )
    return found


def require_backend(
    backend: str, *, runners: Collection[str], machine: Machine | None = None, deadline_s: float = DEADLINE_S
) -> Verdict | None:
    """That ``backend`` exists, can run on this machine, and is among the ``runners`` that the caller has.

    Returns the verdict on MLX, or None for a backend that needs no trial (``auto``, ``cuda``, ``cpu``).

    Raises:
        InvalidSettingError: there is no such backend, ``mlx`` on anything but a Mac with Apple silicon, or a backend
            without a runner.
        MLXUnavailableError: a Mac with Apple silicon whose mlx_lm is missing or does not work.
    """
    known = sorted({"auto", "mlx", *runners})
    if backend not in known:
        raise InvalidSettingError(setting="backend", value=backend, expected=f"one of {', '.join(known)}")
    if backend != "mlx":
        return None
    machine = machine or Machine()
    others = " or ".join(name for name in known if name != "mlx")
    elsewhere = services.not_apple(machine)
    if elsewhere is not None:
        raise InvalidSettingError(setting="backend", value="mlx", expected=f"{others} here: {elsewhere}")
    verdict = services.mlx(machine, deadline_s=deadline_s)
    if not verdict.supported:
        raise MLXUnavailableError(problem=verdict.reason)
    if "mlx" not in runners:
        raise InvalidSettingError(setting="backend", value="mlx", expected=f"{others}: training with MLX is not built")
    return verdict


def check_fp8_settings(*, mode: str, method: str = "sft", load_in_4bit: bool = False) -> None:
    """What `require_fp8` asks of the settings alone. Raises `InvalidSettingError`."""
    expected = None
    if mode != "lora":
        expected = f"false with mode={mode!r}: FP8 is for LoRA, whose frozen layers are what it converts"
    elif method != "sft":
        expected = f"false with method={method!r}: FP8 is for supervised fine-tuning (sft)"
    elif load_in_4bit:
        expected = "false with 4-bit weights: a layer is in one of the two formats"
    if expected is not None:
        raise InvalidSettingError(setting="fp8", value=True, expected=expected)
