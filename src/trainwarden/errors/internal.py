"""INTERNAL_: our own mistakes."""

from __future__ import annotations

from .base import Retry, WardenError


class InternalError(
    WardenError, prefix="INTERNAL_", code="INTERNAL_ERROR", exit_code=70, http_status=500, retry=Retry.NEVER
):
    """Something happened in trainwarden that should be impossible. This is our bug.

    ## Why this happens
    An assumption of the code did not hold, or an exception that nobody foresaw reached the command
    line. Your configuration and your data are not to blame, though they may be what brings it out.

    ## What to do
    Run the command again with `--debug` for the full traceback and report it together with the version
    and the output of `warden probe`. Checkpoints that were written are verified and can be resumed.

    ## Example
    ```console
    $ warden runs ls
    warden: a bug in trainwarden: KeyError: 'status'
    $ warden --debug runs ls
    ```
    """

    template = "a bug in trainwarden: {problem}"
    suggestion = "Run it again with --debug and report the traceback; it is not your fault."
    problem: str
