"""The Hub, Ollama and MLX, against real sockets on this machine."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.waiting import LIMIT_S
from trainwarden.capability import Machine, Status, services
from trainwarden.capability.services import hub, mlx, ollama, ollama_address
from trainwarden.capability.verdict import unsupported

from .scripted import ScriptedMachine


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT", "OLLAMA_HOST", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))


@contextmanager
def server(body: bytes, status: int = 200) -> Iterator[int]:
    """An HTTP server on a free port of this machine that answers everything alike."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield serving.server_port
        finally:
            serving.shutdown()
            thread.join()


@contextmanager
def silent_port() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield int(listening.getsockname()[1])


@contextmanager
def refusing_port() -> Iterator[int]:
    """A port that is taken, so that nobody else can get it, and on which nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield int(bound.getsockname()[1])


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines that an answer meets on the busiest machine."""
    monkeypatch.setattr(services, "OLLAMA_DEADLINE_S", LIMIT_S)
    monkeypatch.setattr(services, "HUB_DEADLINE_S", LIMIT_S)


@pytest.mark.usefixtures("patient")
def test_an_ollama_daemon_is_found_with_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    with server(b'{"version": "0.14.2"}') as port:
        monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{port}")
        verdict = ollama(Machine())
    assert verdict.supported
    assert verdict.reason == f"version 0.14.2 on 127.0.0.1:{port}"


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(
    ("body", "status"),
    [(b"<html>a wiki</html>", 200), (b'{"version": "1"}', 404), (b"[]", 200), (b'{"version": 1}', 200), (b"\xff", 200)],
)
def test_something_else_on_the_port_is_not_taken_for_ollama(
    body: bytes, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server(body, status) as port:
        monkeypatch.setenv("OLLAMA_HOST", f"http://localhost:{port}")
        verdict = ollama(Machine())
    assert verdict.status is Status.UNSUPPORTED
    assert "something other than Ollama answers" in verdict.reason


@pytest.mark.usefixtures("patient")
def test_a_port_where_nobody_listens_is_no_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    with refusing_port() as port:
        monkeypatch.setenv("OLLAMA_HOST", f":{port}")
        verdict = ollama(Machine())
    assert verdict.status is Status.UNSUPPORTED
    assert verdict.reason == f"no daemon on 127.0.0.1:{port}: Connection refused"
    assert "ollama serve" in verdict.fix


def test_a_daemon_that_hangs_is_unknown_after_a_short_while(monkeypatch: pytest.MonkeyPatch) -> None:
    with silent_port() as port:
        monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{port}")
        verdict = ollama(Machine())
    assert verdict.status is Status.UNKNOWN
    assert "no answer within 0.5 s" in verdict.reason


@pytest.mark.parametrize("said", ["127.0.0.1:eleven", "localhost:99999", "http://[::1", "[::1"])
def test_an_address_that_is_none_is_shown_as_it_was_written(said: str) -> None:
    verdict = ollama(ScriptedMachine(environ={"OLLAMA_HOST": said}))
    assert verdict.status is Status.UNSUPPORTED
    assert verdict.reason == f"OLLAMA_HOST is {said!r}, which is no address"


def test_a_daemon_on_another_machine_is_not_asked() -> None:
    verdict = ollama(ScriptedMachine(environ={"OLLAMA_HOST": "gpu-box:11434"}))
    assert verdict.status is Status.UNKNOWN
    assert "names another machine (gpu-box)" in verdict.reason


@pytest.mark.parametrize(
    ("said", "address"),
    [
        ("", ("127.0.0.1", 11434)),
        ("0.0.0.0", ("127.0.0.1", 11434)),
        (":8000", ("127.0.0.1", 8000)),
        ("localhost", ("localhost", 11434)),
        ("http://127.0.0.1", ("127.0.0.1", 80)),
        ("https://example.org:8443/ollama", ("example.org", 8443)),
        ("[::1]:8000", ("::1", 8000)),
    ],
)
def test_ollama_host_is_read_as_ollama_reads_it(said: str, address: tuple[str, int]) -> None:
    assert ollama_address(said) == address


@given(st.text(max_size=40))
def test_no_ollama_host_crashes_the_probe(said: str) -> None:
    assert ollama(ScriptedMachine(environ={"OLLAMA_HOST": said})).reason


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("status", [200, 401, 404, 503])
def test_a_hub_that_answers_anything_is_reachable(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with server(b"", status) as port:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        verdict = hub(Machine())
    assert verdict.supported
    assert verdict.evidence == {"token": False, "http_status": status}
    assert "without a token" in verdict.reason


@pytest.mark.usefixtures("patient")
def test_a_token_counts_by_being_there_and_is_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with server(b"") as port:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        (tmp_path / "token").write_text("hf_abcdefghijklmnopqrstuvwxyz")
        verdict = hub(Machine())
    assert verdict.evidence["token"] is True
    assert "hf_" not in str(verdict.to_dict())


@pytest.mark.usefixtures("patient")
def test_a_hub_that_refuses_is_unsupported_and_a_silent_one_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    with refusing_port() as port:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        assert hub(Machine()).status is Status.UNSUPPORTED
    monkeypatch.setattr(services, "HUB_DEADLINE_S", 0.3)
    with silent_port() as port:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        assert hub(Machine()).status is Status.UNKNOWN


def test_a_hub_address_that_is_none_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "huggingface")
    assert hub(Machine()).status is Status.UNSUPPORTED


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_by_the_environment_asks_nobody(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = ScriptedMachine(environ={name: "1"})
    monkeypatch.setattr(machine, "head", lambda *a, **k: pytest.fail("it was asked"))
    verdict = hub(machine)
    assert verdict.status is Status.DEGRADED
    assert f"offline by {name}" in verdict.reason
    assert hub(ScriptedMachine(environ={name: "0"})).status is Status.UNSUPPORTED


@pytest.mark.parametrize(
    "system", [("Linux", "x86_64"), ("Darwin", "x86_64"), ("Windows", "AMD64"), ("Linux", "arm64")]
)
def test_mlx_is_for_macs_with_apple_silicon(system: tuple[str, str]) -> None:
    machine = ScriptedMachine(system=system, installed=("mlx_lm",))
    verdict = mlx(machine)
    assert verdict.status is Status.UNSUPPORTED
    assert system[1] in verdict.reason
    assert not machine.tasks


def test_mlx_is_tried_where_it_is_installed() -> None:
    mac = ("Darwin", "arm64")
    assert mlx(ScriptedMachine(system=mac)).reason == "mlx_lm is not installed"
    assert mlx(ScriptedMachine(system=mac, installed=("mlx_lm",))).supported
    broken = {"mlx": unsupported("trying it ended the process with SIGILL")}
    assert mlx(ScriptedMachine(system=mac, installed=("mlx_lm",), answers=broken)).status is Status.UNSUPPORTED
