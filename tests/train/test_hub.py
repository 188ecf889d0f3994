"""Why a model could not be loaded, and what is tried again: transient causes, a few times, said aloud."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainwarden.errors import ConfigurationError, ModelLoadError
from trainwarden.train.hub import Backoff, classify, load_with_retries


class HTTPError(OSError):
    """As the clients of the Hub raise it: with the response."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.response = SimpleNamespace(status_code=status)


class GatedRepoError(HTTPError): ...


class RepositoryNotFoundError(HTTPError): ...


class OfflineModeIsEnabled(ConnectionError): ...  # noqa: N818 - the Hub's own name


class ConnectTimeout(Exception): ...  # noqa: N818 - the name of httpx and requests


class SafetensorError(Exception): ...


def wrapped(inner: BaseException) -> OSError:
    """As transformers wraps what the Hub's client raises."""
    outer = OSError("We couldn't connect to the Hub to load the files")
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (HTTPError(500), ("network", True)),
        (HTTPError(503), ("network", True)),
        (HTTPError(429), ("network", True)),
        (HTTPError(408), ("network", True)),
        (ConnectionError("refused"), ("network", True)),
        (TimeoutError(), ("network", True)),
        (ConnectTimeout(), ("network", True)),
        (OfflineModeIsEnabled(), ("network", False)),
        (HTTPError(401), ("auth", False)),
        (HTTPError(403), ("auth", False)),
        (GatedRepoError(403), ("auth", False)),
        (RepositoryNotFoundError(401), ("not_found", False)),
        (HTTPError(404), ("not_found", False)),
        (FileNotFoundError("config.json"), ("not_found", False)),
        (OSError("no file named model.safetensors"), ("not_found", False)),
        (json.JSONDecodeError("bad", "{", 1), ("corrupt", False)),
        (SafetensorError("header too large"), ("corrupt", False)),
        (EOFError(), ("corrupt", False)),
        (ValueError("Unrecognized model"), ("unsupported", False)),
        (KeyError("qwen9"), ("unsupported", False)),
    ],
)
def test_the_category_follows_from_the_type_also_when_wrapped(error: Exception, expected: tuple[str, bool]) -> None:
    assert classify(error) == expected
    if expected[0] != "unsupported":
        assert classify(wrapped(error)) == expected


class Flaky:
    """Fails with the given errors in turn, then loads."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "model"


class Clock:
    def __init__(self) -> None:
        self.slept_s: list[float] = []
        self.said: list[str] = []

    def load(self, flaky: Flaky, attempts: int = 4) -> str:
        backoff = Backoff(attempts=attempts, sleep=self.slept_s.append, random=lambda: 0.0)
        return load_with_retries(flaky, model="some/model", backoff=backoff, say=self.said.append)


def test_transient_failures_are_tried_again_with_growing_pauses_and_announced() -> None:
    clock = Clock()
    flaky = Flaky(HTTPError(503), ConnectionError("reset"))
    assert clock.load(flaky) == "model"
    assert flaky.calls == 3
    assert clock.slept_s == [1.0, 2.0]
    assert clock.said == [
        "loading some/model failed (status 503); attempt 2 of 4 in 1.0 s",
        "loading some/model failed (reset); attempt 3 of 4 in 2.0 s",
    ]


def test_transient_failures_end_after_the_last_attempt() -> None:
    clock, flaky = Clock(), Flaky(*[HTTPError(503) for _ in range(9)])
    with pytest.raises(ModelLoadError) as caught:
        clock.load(flaky)
    assert flaky.calls == 4
    assert caught.value.details["cause_category"] == "network"
    assert caught.value.details["attempts"] == 4
    assert caught.value.details["transient"] is True
    assert isinstance(caught.value.__cause__, HTTPError)


@pytest.mark.parametrize("error", [GatedRepoError(403), HTTPError(404), OfflineModeIsEnabled(), SafetensorError("x")])
def test_what_does_not_pass_by_itself_is_not_tried_again(error: Exception) -> None:
    clock, flaky = Clock(), Flaky(error)
    with pytest.raises(ModelLoadError) as caught:
        clock.load(flaky)
    assert (flaky.calls, clock.slept_s) == (1, [])
    assert caught.value.details["transient"] is False


def test_a_gated_model_says_what_to_do() -> None:
    with pytest.raises(ModelLoadError) as caught:
        Clock().load(Flaky(GatedRepoError(403)))
    assert "hf auth login" in caught.value.suggestion


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), ConfigurationError(place="x", problem="y")]
)
def test_memory_and_typed_errors_are_not_taken_for_a_bad_model(error: Exception) -> None:
    with pytest.raises(type(error)):
        Clock().load(Flaky(error))


@given(failures=st.integers(1, 40), draw=st.floats(0.0, 1.0))
def test_a_pause_is_never_longer_than_the_cap_nor_shorter_than_half(failures: int, draw: float) -> None:
    backoff = Backoff(first_s=1.0, most_s=30.0, random=lambda: draw)
    full_s = min(30.0, 2.0 ** (failures - 1))
    assert full_s / 2 <= backoff.pause_s(failures) <= full_s
