"""What a preflight refuses because the memory it needs is not there."""

from __future__ import annotations

from .base import Retry
from .families import PreflightError, RunError
from .values import JSON


class PreflightRefusedError(
    PreflightError, code="PREFLIGHT_REFUSED", exit_code=78, http_status=422, retry=Retry.AFTER_CHANGE
):
    """A preflight has found something that would end the run.

    ## Why this happens
    Before anything is loaded all rules are evaluated, and everything that they found is listed at once:
    each finding has a code of its own, a severity, the place, and what to change. Findings of severity
    `error` refuse the run.

    ## What to do
    `warden explain` tells about each of the codes. A finding that you know better about is waived with
    `--waive CODE`; it is still listed.

    ## Example
    ```console
    $ warden preflight configs/full.yaml --gpu 'RTX 4090'
    warden: preflight refused, 1 of 1 findings: PREFLIGHT_MEMORY: the run needs 62.1 GiB
    $ warden explain PREFLIGHT_MEMORY
    ```
    """

    template = "preflight refused, {refusing_count} of {findings_count} findings: {problem}"
    suggestion = "Change what the findings name, or waive one that you know better about with --waive CODE."
    refusing_count: int
    findings_count: int
    problem: str
    findings: list[dict[str, JSON]]
    report: dict[str, JSON]


class PreflightMemoryError(
    PreflightError, code="PREFLIGHT_MEMORY", exit_code=78, http_status=422, retry=Retry.AFTER_CHANGE
):
    """The run needs more device memory than there is.

    ## Why this happens
    The peak of two training steps was predicted, on fake tensors or by the closed form, and with the
    overheads (CUDA context, fragmentation, other processes) it is more than the device has. The
    prediction says when the peak is reached and what it consists of. A peak within the stated error of
    the prediction is a warning and refuses nothing.

    ## What to do
    Take the first change of the list that the preflight prints: they stand in the order of what they
    cost. Or use a larger device. If the prediction is wrong, waive it: `--waive PREFLIGHT_MEMORY`.

    ## Example
    ```console
    $ warden preflight models/base --mode lora --gpu 'RTX 3060'
    warden: the run needs 18.31 GiB on the device and has 12.00 GiB
    $ warden preflight models/base --mode qlora --gpu 'RTX 3060'
    ```
    """

    template = "the run needs {needed_bytes} on the device and has {available_bytes}[; {remedy}]"
    suggestion = "Take the first change that makes it fit, or a larger device."
    needed_bytes: int
    available_bytes: int
    peak_bytes: int
    phase: str
    remedy: str | None


class PreflightHostMemoryError(
    PreflightError, code="PREFLIGHT_HOST_MEMORY", exit_code=78, http_status=422, retry=Retry.AFTER_CHANGE
):
    """What the run keeps in host memory does not fit there.

    ## Why this happens
    Offloading moves weights, gradients and optimizer states from the device to host memory, where they
    need as many bytes: 16 for each parameter of full fine-tuning in float32. The available memory is that
    of the machine, or of the container or job if that has less. A kernel that runs out of it ends the
    process without an error.

    ## What to do
    Give the job more memory, offload less (8-bit or bfloat16 states), or train adapters instead of all
    weights.

    ## Example
    ```console
    $ warden preflight configs/full.yaml -o trainer.full_ft_offload=true
    warden: the run needs 119.21 GiB of host memory and has 62.70 GiB
    $ warden preflight configs/lora.yaml
    ```
    """

    template = "the run needs {needed_bytes} of host memory and has {available_bytes}"
    suggestion = "Give the job more host memory, offload less, or train adapters."
    needed_bytes: int
    available_bytes: int


class UnpredictableModelError(
    PreflightError, code="PREFLIGHT_UNPREDICTABLE", exit_code=78, http_status=422, retry=Retry.AFTER_CHANGE
):
    """The memory that this model needs cannot be foretold.

    ## Why this happens
    Two ways were tried. The trace runs the model on fake tensors, which have no values: a model that looks
    at its data, or whose code is not part of transformers, cannot be followed. The closed form knows uniform
    stacks of decoder blocks with attention, and this is none. Nothing was guessed.

    ## What to do
    Train without a preflight: a `Trainer` goes on with a notice, and `oom_recovery` finishes steps that do
    not fit. For a module of your own, `trainwarden.memory.trace.trace` takes a callable and a batch.

    ## Example
    ```console
    $ warden preflight models/odd --gpu 'RTX 4090'
    warden: the memory of models/odd cannot be predicted: the model looks at values, and it is no decoder
    $ warden train configs/odd.yaml
    ```
    """

    template = "the memory of {model} cannot be predicted: {problem}"
    suggestion = "Train without a preflight: oom_recovery finishes steps that do not fit."
    model: str
    problem: str


class FullFinetuneModelTooLargeError(
    RunError, code="RUNTIME_FULL_FT_MODEL_TOO_LARGE", exit_code=78, http_status=422, retry=Retry.AFTER_CHANGE
):
    """All weights of this model cannot be trained in the memory of this device.

    ## Why this happens
    Full fine-tuning keeps weights, gradients and optimizer states on the device: 16 bytes a parameter in
    float32 with AdamW, besides activations. The need was predicted before the weights were loaded, and
    again with the count of the loaded model, and even one row at a time does not fit.

    ## What to do
    The message names what would fit. `full_ft_offload` keeps weights and states in host memory (Linux,
    slower); `mode: lora` trains adapters in a fraction of the memory. If you know better,
    `full_ft_ceiling_billions` sets the number of parameters up to which nothing is refused.

    ## Example
    ```console
    $ warden train configs/full.yaml
    warden: full fine-tuning of base (7.62 billion parameters) needs 121.10 GiB on a device with 23.52 GiB
    $ warden train configs/full.yaml -o model.mode=lora
    ```
    """

    template = (
        "full fine-tuning of {model} ({billions} billion parameters) needs {needed_bytes} on a device with "
        "{available_bytes}[, which carries up to {ceiling_billions} billion]"
    )
    suggestion = "Use full_ft_offload=True or mode='lora'; full_ft_ceiling_billions overrides the ceiling."
    model: str
    billions: float
    ceiling_billions: float | None
    offload_billions: float | None
    needed_bytes: int
    available_bytes: int
    fits: list[str]
