"""`warden explain`: any spelling of a code finds its page, quickly."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwarden.errors import (
    GPUMemoryError,
    NaNLossError,
    UnknownCodeError,
    explain_all_json,
    explain_all_text,
    explain_json,
    explain_markdown,
    explain_text,
    lookup,
    registry,
)
from trainwarden.errors.explain import _blocks
from trainwarden.errors.pages import dedent, sections_of, summary_of


@pytest.mark.parametrize(
    "name", ["RUNTIME_GPU_OOM", "runtime_gpu_oom", " Runtime_GPU_OOM\n", "RESOURCE.OOM", "resource.oom"]
)
def test_a_code_and_its_aliases_find_the_condition_in_any_case(name: str) -> None:
    assert lookup(name) is GPUMemoryError


def test_the_names_of_other_systems_are_aliases() -> None:
    assert lookup("TRAINING.NAN_LOSS") is NaNLossError
    assert lookup("RESOURCE.DISK_FULL").code == "RUNTIME_DISK_FULL"


@pytest.mark.parametrize(
    ("asked", "closest"),
    [
        ("RUNTIME_GPU_OM", "RUNTIME_GPU_OOM"),
        ("nan_loss", "RUNTIME_NAN_LOSS"),
        ("training.nanloss", "TRAINING.NAN_LOSS"),
        ("STATE_CHECKPOINT_INVALD", "STATE_CHECKPOINT_INVALID"),
    ],
)
def test_an_unknown_code_is_answered_with_the_closest_ones(asked: str, closest: str) -> None:
    with pytest.raises(UnknownCodeError) as caught:
        lookup(asked)
    assert caught.value.details["closest"][0] == closest
    assert caught.value.details["asked"] == asked


def test_a_code_that_resembles_nothing_is_said_to() -> None:
    with pytest.raises(UnknownCodeError) as caught:
        explain_text("@@@@")
    assert caught.value.message == "there is no error code @@@@; closest: none"


@given(st.text())
def test_lookup_finds_a_condition_or_refuses_and_never_fails_otherwise(name: str) -> None:
    try:
        found = lookup(name)
    except UnknownCodeError as refusal:
        closest = refusal.details["closest"]
    else:
        closest = [found.code]
    assert all(lookup(each).code in registry() for each in closest)


@pytest.mark.parametrize("code", registry())
def test_the_text_of_every_page_is_complete_and_fits_a_terminal(code: str) -> None:
    text = explain_text(code)
    condition = lookup(code)
    for part in (code, condition.__name__, str(condition.exit_code), condition.retry, *condition.aliases):
        assert part in text
    for title in ("WHY THIS HAPPENS", "WHAT TO DO", "EXAMPLE"):
        assert f"\n{title}\n" in text
    assert max(map(len, text.splitlines())) <= 110
    assert "```" not in text
    assert "## " not in text


def test_the_text_of_a_page() -> None:
    head = explain_text("RUNTIME_NAN_LOSS").partition("\nWHY")[0]
    assert head == (
        "RUNTIME_NAN_LOSS  (NaNLossError)\n"
        "The loss or a gradient was NaN or infinite for too many steps in a row.\n"
        "\n"
        "  exit status        80 (training unstable: NaN, divergence, collapse)\n"
        "  in other profiles  backpropagate 2, genolewm 5\n"
        "  HTTP status        422\n"
        "  retry              after_change: change something first\n"
        "  aliases            TRAINING.NAN_LOSS\n"
        "  details            streak, skipped, what, problem, limit, step, tensor, kind, micro_batch, epoch,\n"
        "                     batch_index, samples\n"
    )


def test_paragraphs_are_filled_lists_hang_and_fences_become_indentation() -> None:
    markdown = f"One\ntwo.\n\n- item {'x ' * 50}\n  continued\n- next\n\n```console\n$ a\n\n  b\n```\nEnd."
    assert _blocks(markdown) == [
        "One two.",
        "",
        "- item " + "x " * 40 + "x",
        "  x x x x x x x x x continued",
        "- next",
        "",
        "    $ a",
        "",
        "      b",
        "End.",
    ]


@pytest.mark.parametrize("code", registry())
def test_the_json_of_every_page_says_the_same(code: str) -> None:
    page = json.loads(explain_json(code))
    condition = lookup(code)
    assert (page["code"], page["type"]) == (code, condition.__name__)
    assert (page["exit_code"], page["http_status"]) == (condition.exit_code, condition.http_status)
    assert list(page["details"]) == list(condition.fields)
    assert all(page["sections"].values())
    assert page["message"] == condition.template


def test_the_whole_list_is_sorted_and_complete() -> None:
    assert [page["code"] for page in json.loads(explain_all_json())] == sorted(registry())
    assert [line.split()[0] for line in explain_all_text().splitlines()] == sorted(registry())


def test_the_markdown_of_a_page_keeps_its_sections() -> None:
    markdown = explain_markdown("resource.oom")
    assert markdown.startswith("# RUNTIME_GPU_OOM\n")
    assert set(sections_of(markdown)) == {"Why this happens", "What to do", "Example"}


def test_headings_inside_code_do_not_begin_a_section() -> None:
    page = "S.\n\n## A\n```python\n## not a heading\n```\n## B\nb"
    assert sections_of(page) == {"A": "```python\n## not a heading\n```", "B": "b"}


def test_a_docstring_loses_its_margin_only() -> None:
    assert dedent("A.\n\n        b\n          c\n    ") == "A.\n\nb\n  c"
    assert summary_of("One\n    line.\n\n    More.") == "One line."
    assert summary_of("") == ""


def test_explaining_loads_nothing_heavy() -> None:
    script = """
import sys
import trainwarden
from trainwarden.errors import explain_json, explain_text
explain_text("RUNTIME_GPU_OOM"), explain_json("RUNTIME_GPU_OOM")
print(*sys.modules)
"""
    command = [sys.executable, "-c", script]
    loaded = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    heavy = {"torch", "numpy", "typer", "rich", "pydantic", "inspect", "difflib", "argparse", "dataclasses"}
    assert not heavy & set(loaded)
