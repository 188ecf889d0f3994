"""Where a run computes and in which precision, each choice with its reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trainwarden.errors import GPUNotAvailableError, InvalidSettingError
from trainwarden.train.settings import DeviceChoice, DtypeChoice, Mode


@dataclass(frozen=True)
class Precision:
    """``compute`` is the type of the forward pass, ``weights`` that of the weights when they are loaded.

    Weights that are trained stay in float32: at fine-tuning rates an update is smaller than bfloat16 can
    resolve.
    """

    compute: torch.dtype
    weights: torch.dtype
    reason: str

    @property
    def accelerate_name(self) -> str:
        """What accelerate calls it (``mixed_precision=``)."""
        return {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.compute]


def choose_device(asked: DeviceChoice) -> tuple[torch.device, str]:
    """The device and why. Raises `GPUNotAvailableError` when CUDA is asked for and not usable."""
    if asked == "cpu":
        return torch.device("cpu"), "as asked"
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device()), "as asked" if asked == "cuda" else "CUDA is usable"
    problem = "this is a CPU build of torch" if torch.version.cuda is None else "torch sees no usable CUDA device"
    if asked == "cuda":
        raise GPUNotAvailableError(device="cuda", problem=problem)
    return torch.device("cpu"), problem


def choose_precision(asked: DtypeChoice, device: torch.device, mode: Mode, *, fp8: bool = False) -> Precision:
    """bfloat16 where the GPU has it, else float32. Raises `InvalidSettingError` for float16 on a CPU.

    ``fp8`` is whether FP8 is asked for: what it leaves, and all where it cannot be used, is computed in bfloat16.
    """
    if asked == "auto" and fp8:
        compute, reason = torch.bfloat16, "what goes with FP8, and stands in for it"
    elif asked == "auto":
        compute, reason = _automatic(device)
    else:
        compute, reason = getattr(torch, asked), "as asked"
    if compute is torch.float16 and device.type == "cpu":
        expected = "float32 or bfloat16 on a CPU, which has no loss scaling"
        raise InvalidSettingError(setting="dtype", value="float16", expected=expected)
    return Precision(compute, torch.float32 if mode == "full" else compute, reason)


def _automatic(device: torch.device) -> tuple[torch.dtype, str]:
    if device.type == "cpu":
        return torch.float32, "a CPU computes float32 fastest without special units"
    if torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16, "this GPU has bfloat16 tensor cores, and bfloat16 needs no loss scaling"
    return torch.float32, "this GPU has no bfloat16 tensor cores"
