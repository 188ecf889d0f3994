"""CONFIG_: the configuration is wrong, or it contradicts the run that it should continue."""

from __future__ import annotations

from .base import Retry
from .families import ConfigError
from .values import JSON


class ConfigurationError(ConfigError, code="CONFIG_INVALID", exit_code=78, http_status=422, retry=Retry.AFTER_CHANGE):
    """The configuration cannot be understood as a whole.

    ## Why this happens
    The file cannot be read, is not valid YAML, lacks a section, or has a key that does not exist.
    Unknown keys are refused rather than ignored: a mistyped `learning_rat` would otherwise train with
    the default for hours.

    ## What to do
    Correct the place that the message names; the nearest known key is suggested where there is one.
    `warden train CONFIG --dry-run` shows every resolved value and where it comes from.

    ## Example
    ```console
    $ warden train configs/lora.yaml
    warden: configuration refused at trainer.learning_rat: unknown key; did you mean learning_rate?
    $ warden train configs/lora.yaml --dry-run
    ```
    """

    template = "configuration refused at {place}: {problem}"
    suggestion = "`warden train CONFIG --dry-run` shows every resolved value and where it comes from."
    place: str
    problem: str
    problems: list[str] | None


class InvalidSettingError(
    ConfigError, code="CONFIG_INVALID_SETTING", exit_code=78, http_status=422, retry=Retry.AFTER_CHANGE
):
    """One setting has a value of the wrong type, out of range, or not among its choices.

    ## Why this happens
    The key is right and the value is not. It may come from the file, from the environment or from `-o`:
    the last of these wins.

    ## What to do
    Give the setting a value as the message expects it.

    ## Example
    ```console
    $ warden train configs/lora.yaml -o trainer.max_steps=-5
    warden: the setting trainer.max_steps is -5, expected an integer of at least 1
    $ warden train configs/lora.yaml -o trainer.max_steps=500
    ```
    """

    template = "the setting {setting} is {value}, expected {expected}"
    suggestion = "Correct this one value; `--dry-run` shows where it comes from."
    setting: str
    value: JSON
    expected: str


class ResumeMismatchError(
    ConfigError, code="CONFIG_RESUME_MISMATCH", exit_code=78, http_status=409, retry=Retry.AFTER_CHANGE
):
    """The code asks for a different run from the one that the checkpoint belongs to.

    ## Why this happens
    Every checkpoint carries a fingerprint: parameter shapes, hyper-parameters, the loader, `max_steps`.
    On resume the code asked for something else. Continuing would give a run that is neither the old one
    nor the new one, so nothing was loaded.

    ## What to do
    Either restore the old values, or accept the named differences on purpose, or start a new run in
    another directory. Shapes of parameters cannot be accepted: the saved weights do not fit.

    ## Example
    ```console
    $ python train.py
    warden: the saved run and this code differ: learning_rate (saved 0.0001, now 0.001)
    ```
    ```python
    guard = Guard("runs/demo", accept_changes=["learning_rate"])
    ```
    """

    template = "the saved run and this code differ: {differences}"
    suggestion = "Restore the old values, name the differences in accept_changes=[…], or use another directory."
    differences: dict[str, dict[str, JSON]]
