"""What a machine or an installation cannot do, found out before a model is loaded."""

from __future__ import annotations

from .base import Retry
from .families import DependencyError, RunError
from .values import JSON


class FSDPUnavailableError(
    DependencyError, code="DEP_FSDP_UNAVAILABLE", exit_code=69, http_status=503, retry=Retry.AFTER_CHANGE
):
    """Full fine-tuning with FSDP and CPU offload cannot run here.

    ## Why this happens
    Before the model is loaded, an all-reduce and one sharded step were tried with as many ranks as the run
    has. That needs Linux (or WSL2) with a CUDA build of torch and NCCL, a GPU for each rank, and host memory
    for weights, gradients and optimizer: 16 bytes a parameter. One of these is missing on at least one rank.
    The run never goes on without offload, for it would only run out of memory later.

    ## What to do
    Read the message: it names what was tried and how it ended. `warden probe` repeats the trial. Otherwise
    use `mode: lora`, a smaller model, or full fine-tuning without offload if the GPU is large enough.

    ## Example
    ```console
    $ warden train configs/full.yaml -o trainer.full_ft_offload=true
    warden: FSDP with CPU offload is not available: this torch has no NCCL (use Linux or WSL2)
    $ warden probe
    ```
    """

    template = "FSDP with CPU offload is not available: {problem}[ ({fix})]"
    suggestion = "`warden probe` tries it again; mode: lora needs none of it."
    problem: str
    fix: str | None
    needed_bytes: int | None
    available_bytes: int


class MLXUnavailableError(
    DependencyError, code="DEP_MLX_UNAVAILABLE", exit_code=69, http_status=503, retry=Retry.AFTER_CHANGE
):
    """This Mac could train with MLX, and its MLX installation does not work.

    ## Why this happens
    The `mlx` backend was asked for on a Mac with Apple silicon. `mlx_lm` is not installed, or importing it
    and multiplying two matrices failed. On any other machine the setting itself is refused
    (`CONFIG_INVALID_SETTING`).

    ## What to do
    Install or reinstall `mlx-lm` in the environment that runs trainwarden, or use another backend.

    ## Example
    ```console
    $ python train.py
    warden: the MLX backend is not available: mlx_lm is not installed
    $ pip install mlx-lm
    ```
    """

    template = "the MLX backend is not available: {problem}"
    suggestion = "`pip install mlx-lm`, or another backend."
    problem: str


class FP8UnsupportedError(
    RunError, code="RUNTIME_FP8_UNSUPPORTED", exit_code=69, http_status=503, retry=Retry.AFTER_CHANGE
):
    """The GPU computes in FP8, and the installed torchao cannot be used for it.

    ## Why this happens
    torchao is installed and importing it fails or ends the process, mostly because it was built for another
    torch. It was tried in a process of its own. Nothing was degraded silently here, since other packages
    that import torchao (transformers, peft) fail as well. A GPU without FP8 units, no GPU, no torchao or a
    model that cannot be converted do not raise this: they train in bf16 with one warning.

    ## What to do
    Install the torchao that goes with this torch, or remove it, or train with `fp8: false`, which is correct
    and only slower.

    ## Example
    ```console
    $ warden train configs/lora.yaml -o trainer.fp8=true
    warden: FP8 cannot be used: torchao cannot be imported: cannot import name 'ScalingType'
    $ pip install --force-reinstall torchao
    ```
    """

    template = "FP8 cannot be used: {problem}"
    suggestion = "Reinstall torchao for this torch, or train with fp8: false."
    problem: str


class QuantizationUnavailableError(
    DependencyError, code="DEP_QUANTIZATION_UNAVAILABLE", exit_code=69, http_status=503, retry=Retry.AFTER_CHANGE
):
    """4-bit weights or 8-bit optimizer states were asked for, and bitsandbytes cannot make them here.

    ## Why this happens
    `mode: qlora` packs the frozen weights to 4 bits, and `optimizer: adamw_8bit` keeps the moments of AdamW in
    8 bits; bitsandbytes does both. Before a model is loaded, a small layer was packed and multiplied, or one step
    taken, on the device of the run, in a process of its own. bitsandbytes is not installed, cannot be imported,
    has no kernels for this device, or computed something wrong. The run never goes on in full precision, for it
    would only run out of memory later.

    ## What to do
    Read the message: it names what was tried and how it ended. Install bitsandbytes (`pip install
    'trainwarden[qlora]'`), or take `mode: lora` and `optimizer: adamw`, which need none of it.

    ## Example
    ```console
    $ warden train configs/lora.yaml -o model.mode=qlora
    warden: 4-bit weights are not available on cpu: bitsandbytes is not installed (pip install bitsandbytes)
    $ pip install 'trainwarden[qlora]'
    ```
    """

    template = "{what} are not available on {device}: {problem}[ ({fix})]"
    suggestion = "Install bitsandbytes, or use mode: lora and optimizer: adamw."
    what: str
    device: str
    problem: str
    fix: str | None


class RequirementUnmetError(
    DependencyError, code="DEP_REQUIREMENT_UNMET", exit_code=69, http_status=503, retry=Retry.AFTER_CHANGE
):
    """This machine does not have what `warden probe --require` asks for.

    ## Why this happens
    Every requirement was compared with what was found by trying it out. The message names each one that is
    not met, what was found instead and why. What could not be found out counts as not met and reads
    "unknown"; what works only in a lesser way reads "degraded".

    ## What to do
    Send the job to another machine, or lower the requirement if the run can do with less. In CI, exit status
    69 means that the machine is the wrong one, not that the code is wrong.

    ## Example
    ```console
    $ warden probe --require 'vram>=80GiB' --require bf16
    warden: 1 of 2 requirements are not met: vram>=80GiB: found 23.99 GiB (on cuda:0)
    $ warden probe
    ```
    """

    template = "{unmet_count} of {required_count} requirements are not met: {problem}"
    suggestion = "`warden probe` shows everything that was found, and what to do about it."
    unmet_count: int
    required_count: int
    problem: str
    unmet: list[dict[str, JSON]]
    report: dict[str, JSON]
