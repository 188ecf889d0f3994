"""What surrounds a run: the Hub, an Ollama daemon, MLX on a Mac. None of these needs a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import urlsplit

from trainwarden.capability.children import Errand
from trainwarden.capability.machine import Machine
from trainwarden.capability.verdict import Verdict, degraded, supported, unknown, unsupported

HUB_DEADLINE_S = 1.2
OLLAMA_DEADLINE_S = 0.5
OLLAMA_PORT = 11434
MLX_DEADLINE_S = 30.0
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_ANY_ADDRESS = ("0.0.0.0", "::", "")
_OLLAMA_FIX = "`ollama serve`, or start the Ollama application"


def hub(machine: Machine) -> Verdict:
    """Whether models can be fetched: by asking the Hub, unless the environment forbids it."""
    environ = machine.environ
    token = bool(environ.get("HF_TOKEN")) or machine.file_exists(_token_file(machine))
    for name in _OFFLINE:
        if environ.get(name, "").lower() in ("1", "true", "yes", "on"):
            reason = f"offline by {name}: only what is in the cache or on disk can be used"
            return degraded(reason, f"unset {name} to download", token=token)
    endpoint = environ.get("HF_ENDPOINT") or "https://huggingface.co"
    host = endpoint.partition("://")[2] or endpoint
    answer = machine.head(endpoint, deadline_s=HUB_DEADLINE_S)
    if answer.status is not None:
        login = "" if token else ", without a token: gated models are refused"
        return supported(f"{host} answers{login}", token=token, http_status=answer.status)
    fix = "use a local directory and HF_HUB_OFFLINE=1, or check the network"
    if answer.timed_out:
        return unknown(f"{host}: no answer within {HUB_DEADLINE_S:g} s", fix, token=token)
    return unsupported(f"{host} cannot be reached: {answer.problem}", fix, token=token)


def _token_file(machine: Machine) -> Path:
    environ = machine.environ
    cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = environ.get("HF_HOME") or f"{cache}/huggingface"
    return Path(environ.get("HF_TOKEN_PATH") or f"{home}/token").expanduser()


def ollama(machine: Machine) -> Verdict:
    """Whether an Ollama daemon answers on this machine, at ``OLLAMA_HOST`` or its usual port."""
    said = machine.environ.get("OLLAMA_HOST", "").strip()
    try:
        host, port = ollama_address(said)
    except ValueError:
        return unsupported(f"OLLAMA_HOST is {said!r}, which is no address", "OLLAMA_HOST=127.0.0.1:11434")
    if host not in _LOOPBACK:
        return unknown(f"OLLAMA_HOST names another machine ({host}), and only this one is asked")
    answer = machine.get_local(host, port, "/api/version", deadline_s=OLLAMA_DEADLINE_S)
    where = f"{host}:{port}"
    if answer.status is None and answer.timed_out:
        return unknown(f"{where}: no answer within {OLLAMA_DEADLINE_S:g} s", _OLLAMA_FIX)
    if answer.status is None:
        return unsupported(f"no daemon on {where}: {answer.problem}", _OLLAMA_FIX)
    version = _version_in(answer.body)
    if answer.status != 200 or version is None:
        fix = f"set OLLAMA_HOST to the daemon's port, or free {port}"
        return unsupported(f"something other than Ollama answers on {where}", fix, http_status=answer.status)
    return supported(f"version {version} on {where}", version=version)


def ollama_address(said: str) -> tuple[str, int]:
    """Host and port of ``OLLAMA_HOST``, which may be a URL, ``host``, ``host:port`` or ``:port``.

    An address to listen on everywhere becomes this machine's. What is none: ValueError.
    """
    parts = urlsplit(said if "://" in said else f"//{said}")
    host = parts.hostname or ""
    default = {"http": 80, "https": 443}.get(parts.scheme, OLLAMA_PORT)
    port = parts.port if parts.port is not None else default
    return ("127.0.0.1" if host in _ANY_ADDRESS else host), port


def _version_in(body: bytes) -> str | None:
    try:
        document = json.loads(body)
    except ValueError:
        return None
    version = document.get("version") if isinstance(document, dict) else None
    return version if isinstance(version, str) and version else None


def mlx(machine: Machine, *, deadline_s: float = MLX_DEADLINE_S) -> Verdict:
    """MLX exists for Macs with Apple silicon only; there, it is tried."""
    elsewhere = not_apple(machine)
    if elsewhere is not None:
        return unsupported(elsewhere, "train with the cuda or cpu backend")
    if not machine.installed("mlx_lm"):
        return unsupported("mlx_lm is not installed", "pip install mlx-lm")
    [report] = machine.run([Errand(["mlx"])], deadline_s=deadline_s)
    return report.verdicts["mlx"]


def not_apple(machine: Machine) -> str | None:
    """Why MLX cannot be had on this machine, or None on a Mac with Apple silicon."""
    system, processor = machine.system()
    if (system, processor) == ("Darwin", "arm64"):
        return None
    name = {"Darwin": "macOS"}.get(system, system)
    return f"MLX runs on macOS with Apple silicon, and this is {name} on {processor}"
