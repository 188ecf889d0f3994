"""Continual LoRA merging: adapters that do not fit, merges that diverge, snapshots that are damaged."""

from __future__ import annotations

from .base import Retry
from .families import DependencyError, InputError, RunError
from .state import CheckpointError
from .values import JSON


class AdapterNotFoundError(InputError, code="INPUT_ADAPTER_NOT_FOUND", exit_code=66, http_status=404):
    """The directory holds no LoRA adapter, or no merge history.

    ## Why this happens
    An adapter is a directory as `save_pretrained` of peft writes it: `adapter_config.json` beside
    `adapter_model.safetensors`. A merge history is a directory that `warden slao merge` wrote. Relative
    paths start at the current directory. A run of `warden train` keeps its adapter in `model/`.

    ## What to do
    Check the spelling, and give the directory itself: neither the file in it nor the one above it.

    ## Example
    ```console
    $ warden slao merge runs/a runs/b --output merged
    warden: there is no adapter in runs/a: adapter_config.json is missing
    $ warden slao merge runs/a/model runs/b/model --output merged
    ```
    """

    template = "there is no {what} in {path}: {problem}"
    suggestion = "Give the directory that holds adapter_config.json, or that `warden slao merge` wrote."
    what: str
    path: str
    problem: str


class PeftAPIError(
    DependencyError, code="PEFT_API_INCOMPATIBLE", exit_code=69, http_status=503, retry=Retry.AFTER_CHANGE
):
    """The installed peft lacks a function that continual merging needs.

    ## Why this happens
    Reading an adapter out of a live model, putting one in, and the pruning of TIES and DARE go through
    functions of peft. This version does not have one of them, or answers in another way.

    ## What to do
    Install the version that this package asks for: `pip install -U 'peft>=0.17'`. Merging directories
    in the modes `slao` and `average` works without peft.

    ## Example
    ```console
    $ warden slao merge a b --mode ties --output merged
    warden: peft 0.9.0 does not offer peft.utils.merge_utils.prune
    $ pip install -U 'peft>=0.17'
    ```
    """

    template = "peft {version} does not offer {missing}"
    suggestion = "Upgrade peft: pip install -U 'peft>=0.17'."
    version: str
    missing: str


class SLAOError(RunError, code="RUNTIME_SLAO_ERROR", exit_code=70, http_status=500, retry=Retry.AFTER_CHANGE):
    """Continual merging failed in a way that no more specific code describes.

    This is also the class to catch for a merge that failed or diverged.

    ## Why this happens
    The orthogonal start came out less than orthogonal, which means damaged arithmetic, or the
    accumulator was changed by another process between the merge and its commit. The accumulator on disk
    is as it was.

    ## What to do
    Repeat the merge: it reads the accumulator again. If it fails in the same way, test the memory of
    the machine.

    ## Example
    ```console
    $ python campaign.py
    warden: continual merging failed: snapshot 4 was committed meanwhile, and this merge started from 3
    $ warden slao history merged
    ```
    """

    template = "continual merging failed: {problem}"
    suggestion = "Repeat the merge: it reads the accumulator again, which is as it was."
    problem: str


class SLAOMergeError(
    SLAOError, code="RUNTIME_SLAO_MERGE_FAILED", exit_code=65, http_status=422, retry=Retry.AFTER_CHANGE
):
    """An adapter cannot be merged: its tensors or its configuration do not fit.

    ## Why this happens
    Before anything is computed the adapter is compared with the accumulator: the same keys, shapes and
    dtypes, and the same rank, alpha and variant (rsLoRA, DoRA), since another scaling would silently
    change what the merged weights mean. Or its file is torn, damaged, or a pickle. Nothing was written.

    ## What to do
    Look at the first difference in the message; `problems` in the details has more. Train all tasks of
    a lineage with one LoRA configuration. Copy a torn file again from where it came.

    ## Example
    ```console
    $ warden slao merge a b --output merged
    warden: the adapter b cannot be merged as number 2: lora_alpha is 32, and 16 in the accumulator
    $ diff a/adapter_config.json b/adapter_config.json
    ```
    """

    template = "the adapter {adapter} cannot be merged[ as number {run_index}]: {problem}"
    suggestion = "Merge adapters of one LoRA configuration and one base model; copy a torn file again."
    adapter: str
    run_index: int | None
    problem: str
    problems: list[str] | None


class SLAOMergeDivergedError(
    SLAOError, code="SLAO_MERGE_DIVERGED", exit_code=80, http_status=422, retry=Retry.AFTER_CHANGE
):
    """A merge has, or would have, values that are not finite, or weights that grew out of proportion.

    ## Why this happens
    The training of this adapter has diverged: it holds NaN or infinite values, or is finite and so large
    that one merge would multiply the norm of a layer by more than `max_norm_growth`. The merge was
    computed beside the accumulator and discarded: the accumulator is as it was, in memory and on disk.
    `checkpoint` is its last good snapshot.

    ## What to do
    Train this task again from the last good snapshot with a lower learning rate, warm-up or gradient
    clipping. If the growth is meant (a first adapter that was hardly trained), raise
    `max_norm_growth`.

    ## Example
    ```console
    $ warden slao merge a b --output merged
    warden: merge 2, of b, diverged at layers.3.self_attn.q_proj.lora_B.weight: the adapter holds NaN
    $ warden slao history merged
    ```
    """

    template = "merge {run_index}, of {adapter}, diverged at {layer}: {problem}"
    suggestion = "Train this task again with a lower learning rate; the accumulator is as it was."
    run_index: int
    layer: str
    problem: str
    adapter: str
    norms: dict[str, JSON]


class SLAOCheckpointError(
    CheckpointError,
    code="STATE_SLAO_CHECKPOINT_INVALID",
    exit_code=74,
    http_status=500,
    retry=Retry.AFTER_CHANGE,
):
    """A snapshot of the accumulator could not be written, or none here is complete and undamaged.

    ## Why this happens
    Each merge is a snapshot with a SHA-256 of every file, never replaced, only followed by the next.
    Opening walks back from the newest to the first that verifies and announces each that it rejects;
    this error means that none is left, or that the one to roll back to is damaged or was retired.

    ## What to do
    `warden slao history DIR` shows which snapshots there are. Roll back to one that is kept, copy the
    directory again from where it came, or merge the adapters again in their order.

    ## Example
    ```console
    $ warden slao rollback merged --to 2
    warden: cannot load the snapshot merged/snapshots/step-00000002: merged.safetensors: its SHA-256 differs
    $ warden slao history merged
    ```
    """

    template = "cannot {operation} the snapshot {path}: {problem}"
    suggestion = "`warden slao history DIR` shows the snapshots; roll back to one that is kept."
    operation: str
    path: str
    problem: str
