"""STATE_: what lies on disk cannot be used as it is."""

from __future__ import annotations

from .base import Retry
from .families import StateError


class CheckpointError(
    StateError, code="STATE_CHECKPOINT_INVALID", exit_code=74, http_status=500, retry=Retry.AFTER_CHANGE
):
    """A checkpoint could not be written, or no checkpoint here is complete and undamaged.

    ## Why this happens
    Every file of a checkpoint is listed with its SHA-256 in a manifest that is written last. Loading
    walks back from the newest one to the first that verifies and announces each that it rejects; this
    error means that none is left, or that the one asked for by path is not valid. On saving: the state
    holds something that cannot be stored without pickle, or the disk refused.

    ## What to do
    On loading, look at the reason in the message: a missing file often was removed by hand, a wrong
    checksum is a damaged disk or copy. Copy the directory again from where it came, or start anew in
    another directory. On saving, the message names the place in the state that cannot be stored.

    ## Example
    ```console
    $ warden resume calm-otter-41
    warden: cannot load the checkpoint runs/demo/checkpoints/step-00000040: model.safetensors: SHA-256 differs
    $ ls runs/demo/checkpoints
    ```
    """

    template = "cannot {operation} the checkpoint {path}: {problem}"
    suggestion = "Restore the directory from a copy; older checkpoints beside it were tried already."
    operation: str
    path: str
    problem: str


class CheckpointNotFoundError(
    StateError, code="STATE_CHECKPOINT_NOT_FOUND", exit_code=66, http_status=404, retry=Retry.AFTER_CHANGE
):
    """A run must be resumed (`resume="must"`), and there is no checkpoint to resume from.

    ## Why this happens
    The directory is another one than before, or the run ended before it wrote its first checkpoint.

    ## What to do
    Check the directory. To begin anew when there is nothing to continue, use `resume="auto"`. To have a
    first checkpoint sooner, lower `checkpoint_every_steps`.

    ## Example
    ```console
    $ warden resume runs/demo
    warden: there is no checkpoint in runs/demo
    $ warden runs ls
    ```
    """

    template = "there is no checkpoint in {path}"
    suggestion = 'Check the run directory; resume="auto" starts anew when there is nothing to continue.'
    path: str


class RunExistsError(StateError, code="STATE_RUN_EXISTS", exit_code=78, http_status=409, retry=Retry.AFTER_CHANGE):
    """A new run was asked for (`resume="never"`) in a directory that already holds one.

    ## Why this happens
    Starting again in place would mix two runs or destroy the first; trainwarden does neither.

    ## What to do
    Choose another directory, or continue the run that is there.

    ## Example
    ```console
    $ warden train configs/quickstart.yaml -o guard.resume=never
    warden: runs/quickstart already holds a run
    $ warden train configs/quickstart.yaml -o output_dir=runs/quickstart-2
    ```
    """

    template = "{path} already holds a run"
    suggestion = 'Choose another directory, or continue with resume="auto".'
    path: str


class RunLockedError(StateError, code="STATE_RUN_LOCKED", exit_code=75, http_status=423, retry=Retry.BACKOFF):
    """Another process is using this run directory.

    ## Why this happens
    A run directory belongs to one process at a time, guarded by a file lock that the system releases
    when the process ends, however it ends. The run is still going, is just writing its last checkpoint,
    or was started twice.

    ## What to do
    Wait for the other process, or stop it with `kill PID` (it finishes its step and writes a
    checkpoint). Do not delete the lock file: it is not what holds the lock.

    ## Example
    ```console
    $ warden resume calm-otter-41
    warden: runs/demo is in use by another process (pid 4711)
    $ kill 4711
    $ warden resume calm-otter-41
    ```
    """

    template = "{path} is in use by another process[ (pid {pid})]"
    suggestion = "Wait for the other process to end, or stop it with `kill PID`."
    path: str
    pid: int | None


class LedgerError(StateError, code="STATE_LEDGER_INVALID", exit_code=74, http_status=500, retry=Retry.AFTER_CHANGE):
    """The list of runs cannot be read or written.

    ## Why this happens
    The ledger is a small SQLite file, `ledger.sqlite` under `$WARDEN_HOME` (by default
    `~/.local/state/trainwarden`). It is damaged, was written by a newer version, lies on a file system
    without locks, or belongs to another user. Runs themselves do not depend on it.

    ## What to do
    Move the file away: a new one is begun, and every run directory can still be resumed by its path. Or
    point `WARDEN_HOME` to a local directory of yours.

    ## Example
    ```console
    $ warden runs ls
    warden: the run ledger ~/.local/state/trainwarden/ledger.sqlite cannot be used: file is not a database
    $ mv ~/.local/state/trainwarden/ledger.sqlite{,.bad}
    $ warden resume runs/demo
    ```
    """

    template = "the run ledger {path} cannot be used: {problem}"
    suggestion = "Move the file away (runs can still be resumed by path), or set WARDEN_HOME."
    path: str
    problem: str
