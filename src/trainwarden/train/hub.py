"""Why a model could not be loaded, and trying again where that helps."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from trainwarden.errors import ModelLoadError, WardenError
from trainwarden.guards.oom import is_out_of_memory

T = TypeVar("T")
CauseCategory = Literal["not_found", "auth", "network", "corrupt", "unsupported"]

_SUGGESTIONS: dict[CauseCategory, str] = {
    "not_found": "Check the name or the directory: a local model has config.json, weights and a tokenizer.",
    "auth": "Accept the model's licence on its page and run `hf auth login`.",
    "network": "Try again later, or download the model once and give its directory.",
    "corrupt": "Fetch or copy the model again: a file of it is damaged or incomplete.",
    "unsupported": "Upgrade transformers, or use a causal language model whose code is part of transformers.",
}
_CONNECTION_ERRORS = (
    "ConnectError",
    "ConnectTimeout",
    "ReadTimeout",
    "ConnectionError",
    "RemoteProtocolError",
)


@dataclass(frozen=True)
class Backoff:
    """Pauses that double from ``first_s`` up to ``most_s``, each shortened at random by up to half."""

    attempts: int = 4
    first_s: float = 1.0
    most_s: float = 30.0
    sleep: Callable[[float], None] = time.sleep
    random: Callable[[], float] = random.random

    def pause_s(self, failures: int) -> float:
        """Seconds to wait after the ``failures``-th failure in a row (from 1)."""
        full_s = min(self.most_s, self.first_s * 2.0 ** (failures - 1))
        return full_s * (1.0 - 0.5 * self.random())


def load_with_retries(
    load: Callable[[], T], *, model: str, backoff: Backoff, say: Callable[[str], None], preface: str = ""
) -> T:
    """What ``load()`` returns; only failures that may pass by themselves are tried again, and said.

    ``preface`` comes before the problem in the error's text.

    Raises `ModelLoadError` with ``cause_category``, ``attempts`` and ``transient`` in its details. Typed
    errors and out-of-memory errors go through untouched.
    """
    attempt = 0
    while True:
        attempt += 1
        try:
            return load()
        except Exception as error:  # boundary: loaders raise whatever their formats and clients do
            if isinstance(error, WardenError) or is_out_of_memory(error):
                raise
            category, transient = classify(error)
            if not transient or attempt >= backoff.attempts:
                problem = preface + first_line(error)
                raise _typed(problem, model, category, transient, attempt) from error
            pause_s = backoff.pause_s(attempt)
            problem = first_line(error)
        say(f"loading {model} failed ({problem}); attempt {attempt + 1} of {backoff.attempts} in {pause_s:.1f} s")
        backoff.sleep(pause_s)


def classify(error: BaseException) -> tuple[CauseCategory, bool]:
    """``(category, whether trying again may help)``, by the chain of causes, the innermost first."""
    for link in reversed(list(_chain(error))):
        found = _by_status(link) or _by_type(link)
        if found is not None:
            return found
    return ("not_found", False) if isinstance(error, OSError) else ("unsupported", False)


def _by_status(error: BaseException) -> tuple[CauseCategory, bool] | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    names = _type_names(error)
    if "GatedRepoError" in names:
        return "auth", False
    # The Hub answers 401 for a repository that does not exist as well as for one that is private.
    if "RepositoryNotFoundError" in names or status in (404, 410):
        return "not_found", False
    if status in (401, 403):
        return "auth", False
    if isinstance(status, int) and (status in (408, 429) or status >= 500):
        return "network", True
    return None


def _by_type(error: BaseException) -> tuple[CauseCategory, bool] | None:
    names = _type_names(error)
    if "OfflineModeIsEnabled" in names:
        return "network", False
    if isinstance(error, ConnectionError | TimeoutError) or names & set(_CONNECTION_ERRORS):
        return "network", True
    if isinstance(error, json.JSONDecodeError | EOFError | UnicodeDecodeError):
        return "corrupt", False
    if names & {"SafetensorError", "UnpicklingError"}:
        return "corrupt", False
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _type_names(error: BaseException) -> set[str]:
    """By name, since clients differ by version (requests, httpx) and importing them costs a second."""
    return {kind.__name__ for kind in type(error).__mro__}


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _typed(problem: str, model: str, category: CauseCategory, transient: bool, attempts: int) -> ModelLoadError:
    details: dict[str, Any] = {"attempts": attempts, "transient": transient}
    return ModelLoadError(
        model=model,
        cause_category=category,
        problem=problem,
        suggestion=_SUGGESTIONS[category],
        **details,
    )
