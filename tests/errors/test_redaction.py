"""No secret and no home path leaves the process; and hiding them never costs the error itself."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwarden.errors import (
    CheckpointError,
    TrainingError,
    dropped_fields,
    failure_text,
    redact,
    redact_value,
)
from trainwarden.errors import redaction as redaction_module
from trainwarden.errors.redaction import redact_usable

ALPHANUMERIC = string.ascii_letters + string.digits
HOME = "/home/ada"
# Long enough not to appear by chance in the words around it.
SECRET = st.text(ALPHANUMERIC, min_size=20, max_size=40)
AROUND = st.text(st.characters(codec="utf-8", exclude_characters=ALPHANUMERIC + "_-'\"\\"), max_size=10)


@pytest.fixture(autouse=True, scope="module")
def a_home() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", HOME)
        yield


SHAPES = [
    "hf_{}",
    "api_org_{}",
    "ghp_{}",
    "github_pat_{}",
    "glpat-{}",
    "sk-proj-{}",
    "xoxb-{}",
    "Authorization: Bearer {}",
    "authorization: Basic {}==",
    "Authorization: {}",
    "bearer {}",
    "https://user:{}@example.org/model",
    "https://{}@example.org/model",
    "postgresql+psycopg://u:p%40{}@db:5432/x",
    "https://example.org/?token={}&x=1",
    "HF_TOKEN={}",
    "WANDB_API_KEY = {}",
    "api-key: {}",
    "apikey={}",
    "password='{}'",
    'passwd="{} with spaces"',
    "db_password={};",
    "aws_secret_access_key = {}",
    '{{"client_secret": "{}"}}',
    "{{'token': '{}'}}",
    r"{{\"hf_token\": \"{}\"}}",
    "--hf-token {}",
    "--password={}",
    "eyJhbGciOiJI.{}.c2lnbmF0dXJl",
    "-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END RSA PRIVATE KEY-----",
    "-----BEGIN PRIVATE KEY-----\n{}",
]


@pytest.mark.parametrize("shape", SHAPES)
@given(secret=SECRET, before=AROUND, after=AROUND)
def test_a_secret_never_survives(shape: str, secret: str, before: str, after: str) -> None:
    assert secret not in redact(f"{before} {shape.format(secret)} {after}")


@given(st.text(ALPHANUMERIC.upper(), min_size=16, max_size=16), st.sampled_from(["AKIA", "ASIA"]))
def test_an_aws_key_id_never_survives(rest: str, kind: str) -> None:
    assert rest not in redact(f"as {kind}{rest}.")


@given(secret=SECRET, key=st.sampled_from(["token", "HF_TOKEN", "api_key", "Authorization", "db-password"]))
def test_a_value_under_a_secret_key_is_hidden_whatever_its_type(secret: str, key: str) -> None:
    value = {"a": [{key: secret}, {key: [secret]}, {key: {"x": secret}}, {key: 12345678}]}
    assert secret not in json.dumps(redact_value(value))
    assert "12345678" not in json.dumps(redact_value(value))


PIECES = st.sampled_from(
    [*(shape.format("x7" * 10) for shape in SHAPES), HOME, "/home/eve/x", "token=", "://", "@", "***"]
)


@given(st.lists(AROUND | PIECES, max_size=6).map(" ".join))
def test_text_that_was_redacted_stays_as_it_is(text: str) -> None:
    assert redact(redact(text)) == redact(text)
    assert redact_usable(redact_usable(text)) == redact_usable(text)


@pytest.mark.parametrize(
    "text",
    [
        "the setting max_tokens=512 is too large",
        "tokens_per_second: 1234, target_tokens=99",
        "pad_token=<pad> eos_token: </s> mask-token=x",
        "from huggingface_hub import hf_hub_download",
        "the tokenizer of a gated model",
        "secrets are never written",
        "https://huggingface.co/org/model/tree/main",
        "s3://bucket/home/x and /mnt/home/x and https://host/home/x",
        "runs/demo/checkpoints/step-00000040",
        "a task-based loop; disk-full",
        "SHA-256 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855 differs",
    ],
)
def test_ordinary_words_are_left_alone(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no file /home/ada/data/x.jsonl", "no file ~/data/x.jsonl"),
        ("in /home/ada.", "in ~."),
        ("'/home/ada'", "'~'"),
        ("--out=/home/ada/x", "--out=~/x"),
        ("cc -I/home/ada/include", "cc -I~/include"),
        ("file:///home/ada/x", "file://~/x"),
        ("/home/adam/x belongs to another", "~/x belongs to another"),
        ("/Users/eve/x", "~/x"),
        (r"C:\Users\eve\x", r"~\x"),
        ("a:/home/eve/y,/home/ada/z", "a:~/y,~/z"),
    ],
)
def test_home_directories_become_a_tilde(text: str, expected: str) -> None:
    assert redact(text) == expected


def test_without_a_home_directory_nothing_is_abbreviated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/")
    assert redact("/data/x") == "/data/x"
    assert redact_usable("/data/x") == "/data/x"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("warden resume /home/ada/runs/a", "warden resume ~/runs/a"),
        ("warden resume '/home/ada/my runs/a'", "warden resume '/home/ada/my runs/a'"),
        ("python x.py --out=/home/ada/x", "python x.py --out=/home/ada/x"),
        ("python /home/adam/x.py", "python /home/adam/x.py"),
        ("cd /home/ada && python x.py", "cd ~ && python x.py"),
        ("HF_TOKEN=abc python x.py", "HF_TOKEN=*** python x.py"),
    ],
)
def test_a_command_stays_runnable(command: str, expected: str) -> None:
    assert redact_usable(command) == expected


def test_a_checkpoint_path_still_loads_after_expanding_the_tilde() -> None:
    path = TrainingError(problem="x", checkpoint_path=f"{HOME}/runs/step-1").to_dict()["checkpoint_path"]
    assert Path(path).expanduser() == Path(HOME, "runs/step-1")


@pytest.mark.parametrize("text", ["a" * 200_000, "eyJ" * 60_000, "token" * 40_000, "a://" * 50_000, "--" * 90_000])
def test_a_long_line_is_redacted_in_linear_time(text: str) -> None:
    """A pattern that backtracks would not come back from these within hours."""
    assert redact(text)


@given(secret=SECRET)
def test_every_way_out_of_an_error_is_redacted(secret: str) -> None:
    error = CheckpointError(operation="save", path=f"{HOME}/c", problem=f"token={secret}", note={f"hf_{secret}": 1})
    error.__cause__ = ValueError(f"password={secret}")
    error.add_context(resume_command=f"HF_TOKEN={secret} warden resume x", checkpoint_path=f"/x?token={secret}")
    for text in (str(error), error.to_json(), failure_text(error)):
        assert secret not in text
        assert HOME not in text


def test_a_field_that_cannot_be_redacted_is_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_on_marble(text: str) -> str:
        if "marble" in text:
            raise RuntimeError("redaction is broken")
        return text

    monkeypatch.setattr(redaction_module, "redact", fail_on_marble)
    error = TrainingError(problem="a marble", other="fine", steps_completed=4)
    before = dropped_fields()
    written = error.to_dict()
    assert written["details"] == {"other": "fine"}
    assert "message" not in written
    assert (written["code"], written["steps_completed"]) == ("RUNTIME_TRAINING_FAILED", 4)
    assert written["fields_dropped"] == dropped_fields() - before == 2
    assert "marble" not in str(error)
    assert "marble" not in failure_text(error)
    assert "RUNTIME_TRAINING_FAILED" in failure_text(error)
