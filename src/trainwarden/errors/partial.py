"""PARTIAL_: finished, but not with everything; and the gate that lets a merge not pass."""

from __future__ import annotations

from .base import Retry
from .families import PartialError, RunError
from .values import JSON


class PartialBatchError(
    PartialError, code="PARTIAL_BATCH_OPERATION", exit_code=85, http_status=422, retry=Retry.AFTER_CHANGE
):
    """Several things were to be done one after the other, and some of them failed.

    ## Why this happens
    The operation was told to go on after a failure (`on_failure: continue`) and came to its end. What
    succeeded is complete and on disk, as if nothing else had been asked for; each item that failed ended
    in an error of its own. `failed` in the details lists them with code and message, `done` the others.
    When nothing at all succeeds the operation ends with the first failure itself, not with this.

    ## What to do
    Look at each failure (`warden explain CODE`) and correct it. The same command then tries again what
    failed, and leaves alone what is done.

    ## Example
    ```console
    $ warden slao run campaign.yaml
    warden: 1 of 3 tasks failed (67 % succeeded): chemistry (RUNTIME_NAN_LOSS)
    $ warden slao run campaign.yaml -o tasks.chemistry.trainer.learning_rate=5e-5
    ```
    """

    template = "{failed_count} of {total} {what} failed ({success_percent} % succeeded): {failures}"
    suggestion = "Correct what the listed items failed of; the same command tries only them again."
    what: str
    failed_count: int
    total: int
    success_percent: int
    failures: str
    failed: list[dict[str, JSON]]
    done: list[str]


class EvalRegressionError(
    RunError, code="RUNTIME_EVAL_GATE_REGRESSED", exit_code=83, http_status=422, retry=Retry.AFTER_CHANGE
):
    """A merge would make an earlier task worse by more than the gate allows; it was taken back.

    ## Why this happens
    Before a merge is committed, the merged adapter is evaluated on the held-out rows of every task in
    it. On one of the earlier tasks the loss is above the lowest that it had since that task was merged, by
    more than `gate.max_forgetting_nats`, or it is no number at all. The merge was discarded: accumulator
    and export are as they were. `losses` in the details has all losses.

    ## What to do
    Take less of new tasks (`merge.schedule: inverse`), train this one more gently (fewer steps, a lower
    learning rate), put it into another place of the order, or allow more forgetting.

    ## Example
    ```console
    $ warden slao run campaign.yaml
    warden: merging law would raise the held-out loss of medicine by 0.412 nats, and the gate allows 0.1
    $ warden slao run campaign.yaml -o tasks.law.trainer.max_steps=100
    ```
    """

    template = (
        "merging {task} would raise the held-out loss of {regressed} by {rise_nats} nats, and the gate allows "
        "{limit_nats}"
    )
    suggestion = "Train this task more gently, take less of it (merge.schedule), or allow more forgetting."
    task: str
    regressed: str
    rise_nats: float
    limit_nats: float
    losses: dict[str, JSON]
