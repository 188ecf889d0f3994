"""The families: what the prefix of a code means. They are caught, never raised."""

from __future__ import annotations

from .base import Retry, WardenError


class InputError(WardenError, prefix="INPUT_", exit_code=64, http_status=400, retry=Retry.NEVER):
    """What was asked for is wrong: the command line, a path, the data. Repeating it does not help."""


class ConfigError(WardenError, prefix="CONFIG_", exit_code=78, http_status=422, retry=Retry.AFTER_CHANGE):
    """What was configured is wrong, or fits neither the machine nor the saved run."""


class PreflightError(WardenError, prefix="PREFLIGHT_", exit_code=78, http_status=422, retry=Retry.AFTER_CHANGE):
    """A look ahead has found that the run cannot succeed as it is configured."""


class DependencyError(WardenError, prefix="DEP_", exit_code=69, http_status=503, retry=Retry.BACKOFF):
    """Something that the run needs from outside is missing: a model, a device, a service."""


class RunError(WardenError, prefix="RUNTIME_", exit_code=70, http_status=500, retry=Retry.AFTER_CHANGE):
    """The run itself ended early."""


class StateError(WardenError, prefix="STATE_", exit_code=74, http_status=500, retry=Retry.AFTER_CHANGE):
    """What lies on disk cannot be used as it is: a checkpoint, a run directory, the ledger."""


class PartialError(WardenError, prefix="PARTIAL_", exit_code=85, http_status=422, retry=Retry.AFTER_CHANGE):
    """The operation came to its end, and not everything in it succeeded."""
