"""DEP_: something from outside that the run needs is not there."""

from __future__ import annotations

from typing import Any

from .base import Retry
from .families import DependencyError


class ModelLoadError(DependencyError, code="DEP_MODEL_LOAD_FAILED", exit_code=69, http_status=503, retry=Retry.BACKOFF):
    """The model or its tokenizer could not be loaded from its directory or from the Hub.

    ## Why this happens
    `cause_category` in the details says which of these it was:

    - `not_found`: the name or directory is wrong, or a file is missing from it;
    - `auth`: the model is gated or private and no valid token was found;
    - `network`: the Hub was unreachable or overloaded; this was already retried with growing pauses;
    - `corrupt`: a file is damaged or incomplete, often after an interrupted download;
    - `unsupported`: the architecture is unknown to the installed `transformers`.

    ## What to do
    For `not_found`, check the name. For `auth`, accept the licence on the model page and run `hf auth
    login`. For `network`, try again later, or download once and use the directory. For `corrupt`,
    download again. For `unsupported`, upgrade `transformers`.

    ## Example
    ```console
    $ warden train configs/lora.yaml
    warden: the model meta-llama/Llama-3.2-1B could not be loaded (auth): access to this model is restricted
    $ hf auth login
    ```
    """

    template = "the model {model} could not be loaded ({cause_category}): {problem}"
    suggestion = "Check the name or directory; for a gated model run `hf auth login`."
    model: str
    cause_category: str
    problem: str

    def __init__(self, **details: Any) -> None:
        super().__init__(**details)
        if details.get("cause_category") != "network":
            self.retry = Retry.AFTER_CHANGE  # type: ignore[misc] # waiting brings no licence and no missing file


class GPUNotAvailableError(
    DependencyError, code="DEP_GPU_NOT_AVAILABLE", exit_code=69, http_status=503, retry=Retry.AFTER_CHANGE
):
    """The device that the run asks for is not usable here.

    ## Why this happens
    No GPU in the machine or the container, a driver that is older than the CUDA of this torch, a CPU
    build of torch, an index beyond the visible devices (`CUDA_VISIBLE_DEVICES`), or a GPU that another
    process holds exclusively. A device that was not asked for is never required: `device: auto` runs on
    what there is.

    ## What to do
    `warden probe` shows driver, CUDA, torch build and devices, and says what does not fit together.

    ## Example
    ```console
    $ warden train configs/lora.yaml -o trainer.device=cuda
    warden: the device cuda is not available: this is a CPU build of torch
    $ warden probe
    ```
    """

    template = "the device {device} is not available: {problem}"
    suggestion = "`warden probe` shows driver, CUDA, torch build and devices."
    device: str
    problem: str
