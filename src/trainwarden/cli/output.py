"""Where the command line writes: data to stdout, all else to stderr, and failures as one block or one document."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any

from trainwarden.errors import ExitProfile, InternalError, WardenError, exit_status, failure_text

DEBUG_VARIABLE = "WARDEN_DEBUG"


class Format(StrEnum):
    """How data is written to stdout."""

    TEXT = "text"
    JSON = "json"
    GITHUB = "github"
    """Annotations for a GitHub job, from the commands that have findings; text from the others."""


@dataclass(frozen=True)
class Output:
    """What the user wants to see. Known before the arguments are parsed, because parsing may fail.

    Attributes:
        json: one JSON document on stdout, also for a failure.
        github: annotations on stdout, from the commands that have some.
        debug: a traceback with each failure.
        profile: exit profile as it was given, still unchecked; ``None`` for the environment's.
    """

    json: bool = False
    github: bool = False
    debug: bool = False
    profile: str | None = None

    @classmethod
    def wanted(cls, arguments: Sequence[str]) -> Output:
        """Read from the command line without judging it: a wrong value is refused when it is parsed."""
        form = _value_of("--output-format", arguments)
        return cls(
            github=form == Format.GITHUB,
            json=form == Format.JSON or "--json" in _options(arguments),
            debug="--debug" in _options(arguments) or os.environ.get(DEBUG_VARIABLE, "") not in ("", "0"),
            profile=_value_of("--exit-profile", arguments),
        )

    def show(
        self,
        text: Callable[[], str],
        document: Callable[[], Any],
        annotations: Callable[[], Sequence[str]] | None = None,
    ) -> None:
        """Write data in the wanted form; only that form is made. No ``annotations``: text stands for them."""
        if self.github and annotations is not None:
            for line in annotations():
                print(line)
        else:
            print(_dumps(document()) if self.json else text())

    def note(self, sentence: str) -> None:
        """Say something that is not data."""
        print(f"warden: {sentence}", file=sys.stderr)

    def fail(self, error: BaseException, *, profile: str | None) -> int:
        """Report a failure, and return the exit status that goes with it.

        Args:
            profile: the checked exit profile. It decides the status of the process; the document keeps our own.
        """
        status = exit_status(error, profile)
        document: dict[str, Any]
        if self.debug:
            traceback.print_exception(error)
        if isinstance(error, KeyboardInterrupt):
            print("\nwarden: stopped at once", file=sys.stderr)
            document = {"type": "KeyboardInterrupt", "message": "stopped at once", "exit_code": status}
        else:
            typed = error if isinstance(error, WardenError) else _bug(error)
            print(failure_text(typed), file=sys.stderr)
            document = {**typed.to_dict(), "exit_profile": str(profile or ExitProfile.WARDEN)}
        if self.json:
            print(_dumps(document))
        return status


def _bug(error: BaseException) -> WardenError:
    found = InternalError(problem=f"{type(error).__name__}: {error}")
    found.__cause__ = error
    return found


def _options(arguments: Sequence[str]) -> Sequence[str]:
    """The arguments before ``--``, behind which nothing is an option of ours."""
    words = list(arguments)
    return words[: words.index("--")] if "--" in words else words


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    """The last value given to an option, as ``--option value`` or ``--option=value``."""
    value = None
    for word, following in pairwise([*_options(arguments), ""]):
        if word == option:
            value = following
        elif word.startswith(f"{option}="):
            value = word.partition("=")[2]
    return value


def _dumps(document: Any) -> str:
    # ASCII, which every stdout can carry unharmed.
    return json.dumps(document, indent=2, allow_nan=False)
