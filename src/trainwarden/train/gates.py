"""What a `Trainer` asks of the machine when it is constructed: to go on, to go on with less, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from torch import nn

from trainwarden.capability import (
    Machine,
    Verdict,
    require_backend,
    require_fp8,
    require_fsdp_offload,
    require_quantized,
)
from trainwarden.capability.gates import Quantized
from trainwarden.capability.verdict import degraded
from trainwarden.train.models import ModelSource
from trainwarden.train.settings import BackendChoice, DeviceChoice

if TYPE_CHECKING:
    from trainwarden.train.trainer import Trainer

RUNNERS = ("cpu", "cuda")
"""The backends that a `Trainer` can train on."""
FP8_FALLBACK = "FP8 cannot be used, training in bf16: "
"""How the one warning begins; the reason follows."""


@dataclass(frozen=True)
class Granted:
    """What was asked for and may be used; ``warnings`` says what was not granted and why, to be told by each run.

    ``fp8`` and ``offload`` are None where they were not asked for.
    """

    fp8: Verdict | None = None
    offload: Verdict | None = None
    quantized: Mapping[Quantized, Verdict] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def trains_in_fp8(self) -> bool:
        return self.fp8 is not None and self.fp8.supported


def ask(trainer: Trainer, machine: Machine | None = None) -> Granted:
    """Consults the gates of all that the trainer's settings ask for, without loading a model.

    Raises:
        InvalidSettingError: a backend that this machine or this version does not train on, or FP8 on 4-bit weights.
        MLXUnavailableError: MLX on a Mac that lacks it.
        FP8UnsupportedError: the GPU computes in FP8 and the installed torchao cannot be imported.
        FSDPUnavailableError: full fine-tuning cannot be offloaded here.
        QuantizationUnavailableError: 4-bit weights or 8-bit optimizer states cannot be had here.
    """
    machine = machine or Machine()
    require_backend(trainer.backend, runners=RUNNERS, machine=machine)
    warnings: list[str] = []
    fp8 = _fp8(trainer, machine, warnings) if trainer.fp8 else None
    offload = _offload(trainer, machine) if trainer.full_ft_offload else None
    return Granted(fp8, offload, _quantized(trainer, machine), tuple(warnings))


def device_asked(device: DeviceChoice, backend: BackendChoice) -> DeviceChoice:
    """Where to train, said by either setting; they have been found to agree."""
    return backend if device == "auto" and backend in ("cpu", "cuda") else device


def parameter_count(source: ModelSource) -> int | None:
    """How many parameters a model has, from the object or the headers of its files; None without either."""
    if isinstance(source, nn.Module):
        return sum(parameter.numel() for parameter in source.parameters())
    if not isinstance(source, str | Path):
        return None
    files = sorted(Path(source).expanduser().glob("model*.safetensors"))
    try:
        return sum(_stored_numbers(file) for file in files) if files else None
    except (OSError, SafetensorError):
        return None  # loading it will say what is wrong, and with which file


def _stored_numbers(path: Path) -> int:
    total = 0
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            count = 1
            for size in file.get_slice(name).get_shape():
                count *= size
            total += count
    return total


def _fp8(trainer: Trainer, machine: Machine, warnings: list[str]) -> Verdict:
    if device_asked(trainer.device, trainer.backend) == "cpu":
        reason = "the device is cpu, as asked, which has no FP8 units"
        warnings.append(f"{FP8_FALLBACK}{reason}")
        return degraded(f"bf16 instead of FP8: {reason}", "train on a GPU")
    in_4bit = bool(getattr(trainer.model, "is_loaded_in_4bit", False))
    return require_fp8(mode=trainer.mode, load_in_4bit=in_4bit, machine=machine, warn=warnings.append)


def _offload(trainer: Trainer, machine: Machine) -> Verdict:
    rehearsed = device_asked(trainer.device, trainer.backend) == "cpu"
    return require_fsdp_offload(
        parameters=parameter_count(trainer.model), machine=machine, backend="gloo" if rehearsed else "nccl"
    )


def _quantized(trainer: Trainer, machine: Machine) -> dict[Quantized, Verdict]:
    asked: dict[Quantized, bool] = {"nf4": trainer.mode == "qlora", "adam8bit": trainer.optimizer == "adamw_8bit"}
    wanted = [one for one, is_asked in asked.items() if is_asked]
    on_cpu = device_asked(trainer.device, trainer.backend) == "cpu"
    return require_quantized(wanted, on_cpu=on_cpu, machine=machine) if wanted else {}
