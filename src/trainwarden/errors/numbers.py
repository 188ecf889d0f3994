"""RUNTIME_: the numbers of a run have left the range in which training means anything."""

from __future__ import annotations

from .base import Retry
from .families import RunError


class LossSpikeError(RunError, code="RUNTIME_LOSS_SPIKE", exit_code=80, http_status=422, retry=Retry.AFTER_CHANGE):
    """The loss or the gradient norm jumped far above its usual range, and the policy says to end the run.

    ## Why this happens
    Each value is compared with the median of the window before it, in units of the window's own noise (see
    docs/numbers.md). A jump is a batch unlike the others, a learning rate at the edge of what the model bears,
    or numbers too coarse for it. With `SpikePolicy(action="rollback")` the run goes back and leaves the
    batches out; this error comes with `abort`, or when it has gone back as often as it may. Checkpoints from
    before `first_step` are untouched by the spike; the one named here is from before it where there is one.

    ## What to do
    Look at the batches of the steps named. Lower the learning rate, lengthen the warm-up, clip gradients;
    or let the run go back by itself with `action="rollback"`. If the jump is what you expect (a new phase of
    the data), use `announce`.

    ## Example
    ```console
    $ python train.py
    warden: spike of the grad_norm at step 812: 41.3 where 1.7 is usual (11.2 deviations)
    $ warden train configs/lora.yaml -o trainer.learning_rate=0.00005
    ```
    """

    template = (
        "spike of the {signal} at step {step}: {value} where {usual} is usual ({deviations} deviations)[; {problem}]"
    )
    suggestion = "Look at the batches of these steps; lower the learning rate, clip gradients, or use action=rollback."
    signal: str
    step: int
    first_step: int
    value: float
    usual: float
    deviations: float
    problem: str | None


class CollapseDetectedError(
    RunError,
    code="RUNTIME_COLLAPSE_DETECTED",
    exit_code=80,
    http_status=422,
    retry=Retry.AFTER_CHANGE,
    aliases=("TRAINING.COLLAPSE_DETECTED",),
):
    """A representation that the run watches has degenerated.

    ## Why this happens
    Models that predict their own representations can make the loss small by making all representations
    alike. The variance of the dimensions, the effective rank and the mean distance of two samples tell it:
    one of them stayed below its share of the first measurement (or of the reference's variance) for several
    measurements in a row. The loss may look better than ever.

    ## What to do
    Go back to an earlier checkpoint, and change what keeps representations apart: a variance or covariance
    term, a stop-gradient, a slower target network, a lower learning rate. If the representation is meant to
    become simpler, lower the share in `CollapsePolicy`.

    ## Example
    ```console
    $ python train.py
    warden: encoder has collapsed: pairwise_distance 0.12 is below 1.84 for 3 measurements in a row
    $ ls runs/demo/checkpoints
    ```
    """

    template = (
        "{representation} has collapsed: {criterion} {value} is below {threshold} "
        "for {measurements} measurements in a row"
    )
    suggestion = "Go back to an earlier checkpoint and strengthen what keeps representations apart."
    representation: str
    criterion: str
    value: float
    threshold: float
    measurements: int
    step: int


class StateNotFiniteError(
    RunError, code="RUNTIME_STATE_NOT_FINITE", exit_code=80, http_status=422, retry=Retry.AFTER_CHANGE
):
    """Weights or optimizer state hold NaN or infinity, so no checkpoint is written of them.

    ## Why this happens
    Steps with non-finite gradients never reach the weights, but finite ones can still drive a weight over the
    edge: a learning rate that is too high, weights in float16, an optimizer that divides by what has become
    zero, code that writes into weights by itself. Every checkpoint is preceded by one pass over the trained
    parameters and the optimizer's state. Buffers and frozen weights are not looked at: a mask may hold
    infinities on purpose.

    ## What to do
    Resume from the checkpoint named here, which is finite, with a lower learning rate, gradient clipping, or
    bfloat16 instead of float16.

    ## Example
    ```console
    $ python train.py
    warden: model.head.weight holds nan after step 400: no checkpoint is written
    $ warden resume calm-otter-41
    ```
    """

    template = "{tensor} holds {kind} after step {step}: no checkpoint is written"
    suggestion = "Resume from the last checkpoint, which is finite, with a lower learning rate or gradient clipping."
    tensor: str
    kind: str
    step: int


class RollbackNeededError(RunError, code="RUNTIME_ROLLBACK_NEEDED", exit_code=75, http_status=503, retry=Retry.RESUME):
    """The run goes back to an earlier checkpoint and trains on without the batches that spoiled it.

    ## Why this happens
    A policy with the action `rollback` met its condition: a spike, or steps that were not finite. What the
    guard cannot undo in a loop of yours are your own variables, so the process ends, and the next start does
    the rest: it loads the checkpoint, leaves out the batches named in `rollbacks.json` in the run directory,
    and lowers the learning rate where the policy says so. A `Trainer` goes back by itself, without a restart.

    ## What to do
    Start the run again, or let a supervisor that restarts on exit status 75 do it. How often a run goes back
    is limited over all its restarts (`RollbackPolicy.max_rollbacks`). To see the batches again, remove
    `rollbacks.json`.

    ## Example
    ```console
    $ python train.py
    warden: going back to step 700 and leaving out the batches of steps 801 to 815: spike of the loss (1 of 3)
    $ python train.py
    ```
    """

    template = (
        "going back to step {checkpoint_step} and leaving out the batches of steps {first_step} to {last_step}: "
        "{reason} ({rollbacks} of {max_rollbacks})"
    )
    suggestion = "Start the run again: it continues from the earlier checkpoint without these batches."
    reason: str
    first_step: int
    last_step: int
    checkpoint_step: int
    rollbacks: int
    max_rollbacks: int
    learning_rate_factor: float
