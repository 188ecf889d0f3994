"""Let a script that dies of one of our errors say so usefully and exit with its status, instead of 1."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType

from .base import Retry, WardenError
from .failure import failure_text

_ExceptHook = Callable[[type[BaseException], BaseException, TracebackType | None], object]

_handling: BaseException | None = None


class _Hook:
    """Our link in the chain of except hooks; it hands everything that is not ours to the one before it."""

    def __init__(self, previous: _ExceptHook) -> None:
        self.previous = previous

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        global _handling
        # A later link may have put a second one of us above this one: only the outermost speaks and exits.
        if not isinstance(error, WardenError) or error is _handling:
            self.previous(kind, error, trace)
            return
        _handling = error
        try:
            if error.retry is not Retry.RESUME:  # a clean stop needs no traceback
                self._hand_on(kind, error, trace)
            _print_failure(error)
        finally:
            _handling = None
        if not hasattr(sys, "ps1"):  # at an interactive prompt the session goes on
            # The interpreter takes this from a hook too: exit handlers run and streams are flushed.
            raise SystemExit(error.exit_code)

    def _hand_on(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        try:
            self.previous(kind, error, trace)
        except SystemExit:
            return  # whatever status it had in mind, the one of the error says more
        except Exception:  # noqa: BLE001 - boundary: somebody else's hook must not cost the user the error
            sys.__excepthook__(kind, error, trace)


def install_excepthook() -> bool:
    """Make an uncaught `WardenError` print its failure block and end the process with its exit status.

    Chains into the present `sys.excepthook`; other exceptions go there untouched. Installing twice changes
    nothing.
    The status is always the one of our own table: whoever started the process maps it, once.

    Returns:
        Whether the hook is in place. Off the main thread nothing is done.
    """
    import threading

    if threading.current_thread() is not threading.main_thread():
        return False
    if not isinstance(sys.excepthook, _Hook):
        sys.excepthook = _Hook(sys.excepthook)
    return True


def _print_failure(error: WardenError) -> None:
    try:
        block = failure_text(error)
    except Exception:  # noqa: BLE001 - boundary: a defect in printing must not hide the error
        block = f"warden: [{error.code}] warden explain {error.code}"
    try:
        print(f"\n{block}", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        return  # stderr is gone; the exit status still tells
