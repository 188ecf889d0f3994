"""RUNTIME_: the run ended early."""

from __future__ import annotations

from .base import Retry
from .families import RunError


class TrainingError(RunError, code="RUNTIME_TRAINING_FAILED", exit_code=70, http_status=500, retry=Retry.AFTER_CHANGE):
    """Training failed in a way that no more specific code describes.

    ## Why this happens
    An exception came out of the training code, the model or the data loader that is neither out of
    memory, nor a NaN, nor a stop. The chained cause (`raised from`) is the original exception and holds
    its traceback.

    ## What to do
    Read the cause. What was trained up to the last checkpoint is safe: correct the code and resume.

    ## Example
    ```console
    $ python train.py
    warden: training failed: IndexError: index 32000 is out of bounds for the embedding
    $ warden resume calm-otter-41
    ```
    """

    template = "training failed: {problem}"
    suggestion = "Read the chained cause; after correcting it, resume from the last checkpoint."
    problem: str


class TrainingAbortedError(
    RunError, code="RUNTIME_TRAINING_ABORTED", exit_code=75, http_status=503, retry=Retry.RESUME
):
    """Training was asked to stop and did so cleanly; nothing is lost.

    ## Why this happens
    A signal (Ctrl-C, `SIGTERM` from a scheduler, preemption) or a policy asked the run to stop. The
    step in progress was finished and a checkpoint written and verified. `steps_completed` and
    `checkpoint_path` say where the run stands. A second signal would have stopped at once, without the
    checkpoint.

    ## What to do
    Resume whenever you like; the continued run is the one that would have been. A scheduler should
    requeue on exit status 75.

    ## Example
    ```console
    $ warden train configs/quickstart.yaml
    ^C
    warden: training stopped cleanly on SIGINT
    $ warden resume calm-otter-41
    ```
    """

    template = "training stopped cleanly on {reason}"
    suggestion = "Resume: the run continues where it stopped."
    reason: str


class GPUMemoryError(
    RunError,
    code="RUNTIME_GPU_OOM",
    exit_code=81,
    http_status=422,
    retry=Retry.AFTER_CHANGE,
    aliases=("RESOURCE.OOM",),
):
    """Memory ran out, and what could be done about it did not help or was not allowed.

    ## Why this happens
    With `oom_recovery` every phase of a run survives running out of memory where that can be exact (see
    docs/phases.md): forward and backward are done in smaller micro-batches, an optimizer step is finished
    in parts, and whatever has nothing to split is tried again after memory was released. This error means
    that the limit was reached: `max_shrinks` shrinks in one step, a single row or parameter that does not
    fit, recovery switched off, or an optimizer whose step cannot be finished in parts. `details` name the
    phase, the bytes requested, free and reserved, the process that holds most of the rest, and what would
    fit, as far as they are known. The checkpoint named is of a completed step; weights that a failed
    optimizer step has left half updated are never saved.

    ## What to do
    In the order of what costs least: shorter sequences, gradient checkpointing, `mode: lora` instead of
    `full`, an optimizer with less state, a smaller model, a larger device. Check that no other process
    holds the memory (`nvidia-smi`). If a single row does not fit, a smaller batch does not help. Then
    resume.

    ## Example
    ```console
    $ python train.py
    warden: memory ran out in backward at micro-batch size 1 after 3 shrinks: CUDA out of memory
    $ warden train configs/lora.yaml -o data.max_length=1024
    ```
    """

    template = (
        "memory ran out in {phase}[ at micro-batch size {micro_batch_size}][ after {shrinks} shrinks][: {problem}]"
        "[; {would_fit} would do]"
    )
    suggestion = "Use shorter sequences, gradient checkpointing, LoRA, or a smaller model; then resume."
    phase: str
    micro_batch_size: int | None
    shrinks: int | None
    requested_bytes: int | None
    free_bytes: int | None
    reserved_bytes: int | None
    foreign_pid: int | None
    foreign_bytes: int | None
    would_fit: str | None
    problem: str


class RankLostError(RunError, code="RUNTIME_RANK_LOST", exit_code=75, http_status=503, retry=Retry.RESUME):
    """Another process of the run is gone or silent, so this one cannot go on.

    ## Why this happens
    The ranks of a run act together. When one is killed (by the host's out-of-memory killer, a lost
    node, a person), ends with an error of its own, or does not answer within the deadline, all others
    end with this error instead of waiting for ever or training on without it.

    ## What to do
    Find the rank that ended first: its own last lines, or the kernel log of its host, say why. Then
    start all ranks again; the run continues from the last checkpoint.

    ## Example
    ```console
    $ torchrun --nproc-per-node 2 train.py
    warden: rank 0 of 2 lost another rank: vote: connection closed by peer
    $ torchrun --nproc-per-node 2 train.py
    ```
    """

    template = "rank {rank} of {world_size} lost another rank: {problem}"
    suggestion = "Look at the rank that ended first, then start all ranks again: the run continues from its checkpoint."
    rank: int
    world_size: int
    problem: str


class RestartNeededError(RunError, code="RUNTIME_RESTART_NEEDED", exit_code=75, http_status=503, retry=Retry.RESUME):
    """Memory ran out in the middle of what all ranks do together; a restart needs less.

    ## Why this happens
    The parameters of a sharded model (FSDP2) are gathered from all ranks layer by layer. A rank that
    runs out of memory between two layers cannot try again alone: the others wait in the next gather. So
    all ranks end, this one with the smaller micro-batch written down in the run directory.

    ## What to do
    Start all ranks again. The run continues from its last checkpoint with micro-batches of the size
    named here. A launcher that restarts on exit status 75 (`torchrun --max-restarts`) does it by itself.

    ## Example
    ```console
    $ torchrun --nproc-per-node 8 train.py
    warden: memory ran out in forward: the next start uses micro-batches of 4
    $ torchrun --nproc-per-node 8 --max-restarts 3 train.py
    ```
    """

    template = "memory ran out in {phase}: the next start uses micro-batches of {micro_batch_size}[ ({problem})]"
    suggestion = "Start all ranks again: the run continues from its checkpoint with the smaller micro-batch."
    phase: str
    micro_batch_size: int
    problem: str


class SplitRefusedError(
    RunError, code="RUNTIME_SPLIT_REFUSED", exit_code=81, http_status=422, retry=Retry.AFTER_CHANGE
):
    """Memory ran out, and this batch cannot be split without changing the gradient.

    ## Why this happens
    Recovery finishes a step in parts, and the parts must add up to the whole. They do not when the loss
    couples rows (contrastive losses, BatchNorm), when it sums instead of averaging, when it averages
    over tokens while the parts are weighed by rows, or when the batch is of a kind that cannot be cut.
    A recovered run with wrong gradients would be worse than a stopped one.

    ## What to do
    For a token mean, say what the mean is taken over: `weight=trainwarden.target_tokens`. For a batch
    of your own type, pass `split=`. For a loss that couples rows, choose a batch that fits; your own
    accumulation still works.

    ## Example
    ```console
    $ python train.py
    warden: memory ran out and the batch of 8 cannot be split: labels hold -100 and no weight= was given
    ```
    ```python
    loss = guard.backward(compute_loss, batch, weight=trainwarden.target_tokens)
    ```
    """

    template = "memory ran out and the batch[ of {micro_batch_size}] cannot be split: {problem}"
    suggestion = "Pass weight= or split= to guard.backward, or choose a batch size that fits."
    problem: str
    micro_batch_size: int | None
    out_of_memory: str | None


class NaNLossError(
    RunError,
    code="RUNTIME_NAN_LOSS",
    exit_code=80,
    http_status=422,
    retry=Retry.AFTER_CHANGE,
    aliases=("TRAINING.NAN_LOSS",),
):
    """The loss or a gradient was NaN or infinite for too many steps in a row.

    ## Why this happens
    A single non-finite step is skipped and counted; the weights never see it. A streak, or too large a
    share of the last steps (`limit` says which), means that the run does not come back by itself: a
    learning rate that is too high, float16 without a loss scaler, rows without a single target, a
    division by zero or a logarithm of zero in the loss. The last checkpoint holds finite weights.
    `details` name the first tensor that was not finite (the loss, or the parameter of a gradient),
    whether it held NaN or an infinity, the step, the backward pass within it, and the samples of that
    batch as far as they are known.

    ## What to do
    Resume from the checkpoint with a lower learning rate, warm-up or gradient clipping; train in
    bfloat16 instead of float16. If it fails at the same step with any learning rate, look at the data
    of that step.

    ## Example
    ```console
    $ python train.py
    warden: the loss was not finite for 5 steps in a row (7 skipped in all)
    $ warden train configs/lora.yaml -o trainer.learning_rate=0.00005
    ```
    """

    template = "the {what} was not finite for {streak} steps in a row[ ({skipped} skipped in all)][: {problem}]"
    suggestion = "Lower the learning rate, clip gradients, prefer bfloat16; the last checkpoint is finite."
    streak: int
    skipped: int
    what: str
    problem: str | None
    limit: str | None
    step: int | None
    tensor: str | None
    kind: str | None
    micro_batch: int | None
    epoch: int | None
    batch_index: int | None
    samples: list[int] | None


class DataLoaderError(
    RunError,
    code="RUNTIME_DATALOADER_FAILED",
    exit_code=65,
    http_status=422,
    retry=Retry.AFTER_CHANGE,
    aliases=("TRAINING.DATALOADER_FAILED",),
):
    """The data of the run could not be loaded any further, or too much of it could not be read.

    ## Why this happens
    A sample or batch that cannot be read, decoded or collated is left out, and a line of `errors.jsonl` in
    the run directory says which and why. When more than `max_share` of the data is left out (1 % unless
    the policy says otherwise), what is trained is no longer what was asked for, and the run ends. It also
    ends, at once, when it is not a sample that failed but the loader: a worker process was killed (mostly
    by the host's out-of-memory killer), the workers delivered nothing for `worker_timeout_s`, memory or
    file handles ran out in them, or a stream broke off. `details` say which (`fault`), and how much was
    left out of how much.

    ## What to do
    For bad data, read `errors.jsonl`: it names index, kind of error and place in the code. Repair or remove
    the samples, or allow more (`data=DataPolicy(max_share=...)`). Where one bad sample costs a whole batch,
    `trainwarden.skip_unreadable(dataset)` leaves out only the sample. For workers that died, use fewer of
    them, or a smaller `prefetch_factor`. For workers that hang, look at the storage; what takes long by
    nature needs a longer `worker_timeout_s`. Then resume: the run goes on at the batch at which it ended.

    ## Example
    ```console
    $ python train.py
    warden: data could not be loaded: 11 of 1,000 batches were left out (1.10 %, allowed are 1.00 %)
    $ tail -n 1 runs/demo/errors.jsonl
    ```
    """

    template = "data could not be loaded: {problem}"
    suggestion = "Read errors.jsonl in the run directory and repair the data or the loader; then resume."
    problem: str
    fault: str
    cause: str | None
    batches_seen: int
    batches_left_out: int
    samples_left_out: int
    share: float
    max_share: float
    epoch: int
    batch_index: int
    rank: int


class DiskFullError(
    RunError,
    code="RUNTIME_DISK_FULL",
    exit_code=74,
    http_status=507,
    retry=Retry.AFTER_CHANGE,
    aliases=("RESOURCE.DISK_FULL",),
):
    """There is not enough space to write a checkpoint.

    ## Why this happens
    Free space is checked before a checkpoint is written, and a write that still runs out is undone. The
    previous verified checkpoint is untouched: its successor is complete before it is removed, so space
    for one checkpoint more than `keep_last` is needed. A quota looks like a full disk.

    ## What to do
    Free space or move the run directory to a larger disk, then resume. Fewer kept checkpoints
    (`keep_last`) and `mode: lora` need less. trainwarden removes only checkpoints that it wrote.

    ## Example
    ```console
    $ python train.py
    warden: no space for a checkpoint in runs/demo/checkpoints: 3.20 GiB needed, 1.10 GiB free
    $ df -h runs/demo
    $ warden resume calm-otter-41
    ```
    """

    template = "no space for a checkpoint in {path}[: {needed_bytes} needed, {free_bytes} free]"
    suggestion = "Free some space, or lower keep_last; then resume."
    path: str
    needed_bytes: int | None
    free_bytes: int | None
