"""A class that breaks the contract cannot even be defined."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from trainwarden.errors import GPUMemoryError, Retry, WardenError, lookup, registry
from trainwarden.errors.families import RunError

PAGE = """A fan stands still.

## Why this happens
Dust.

## What to do
Clean it.

## Example
    warden: the fan 1 stands still
"""

pytestmark = pytest.mark.usefixtures("scratch_registry")


def define(base: type[WardenError] = RunError, **changes: Any) -> type[WardenError]:
    """A correct condition with something changed."""
    keywords: dict[str, Any] = {
        "code": "RUNTIME_FAN_STUCK",
        "exit_code": 82,
        "http_status": 503,
        "retry": Retry.AFTER_COOLDOWN,
    }
    body: dict[str, Any] = {
        "__doc__": PAGE,
        "__module__": __name__,
        "template": "the fan {fan} stands still",
        "suggestion": "Clean it.",
        "__annotations__": {"fan": "int"},
    }
    keywords.update({name: value for name, value in changes.items() if name in {*keywords, "aliases", "prefix"}})
    body.update({name: value for name, value in changes.items() if name not in {*keywords, "aliases", "prefix"}})
    return type("FanError", (base,), body, **keywords)


def test_a_correct_class_is_registered_by_its_code_and_its_aliases() -> None:
    condition = define(aliases=("HARDWARE.FAN", "42299"))
    assert registry()["RUNTIME_FAN_STUCK"] is lookup("hardware.fan") is lookup("42299") is condition
    error = condition(fan=1)
    assert (error.message, error.retryable, error.exit_code) == ("the fan 1 stands still", True, 82)


def test_the_registry_cannot_be_written_to() -> None:
    with pytest.raises(TypeError):
        registry()["RUNTIME_FAN_STUCK"] = GPUMemoryError  # type: ignore[index]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"code": "runtime_fan"}, "upper snake case"),
        ({"code": "RUNTIME"}, "upper snake case"),
        ({"code": "RUNTIME__FAN"}, "upper snake case"),
        ({"code": "FAN_STUCK"}, "unknown family"),
        ({"code": "STATE_FAN"}, "its family begins with RUNTIME_"),
        ({"code": "RUNTIME_GPU_OOM"}, "already belongs to GPUMemoryError"),
        ({"aliases": ("RESOURCE.OOM",)}, "RESOURCE.OOM already belongs to GPUMemoryError"),
        ({"aliases": ("RUNTIME_GPU_OOM",)}, "already belongs to GPUMemoryError"),
        ({"aliases": ("fan",)}, "'fan' is no alias"),
        ({"aliases": ("123",)}, "'123' is no alias"),
        ({"aliases": ("A.B", "A.B")}, "repeats a name"),
        ({"aliases": ("RUNTIME_FAN_STUCK",)}, "repeats a name"),
        ({"exit_code": 1}, "exit status 1 is not a failure"),
        ({"exit_code": 2}, "exit status 2 is not a failure"),
        ({"exit_code": 137}, "exit status 137 is not a failure"),
        ({"exit_code": 0}, "exit status 0 is not a failure"),
        ({"http_status": 200}, "HTTP status 200"),
        ({"retry": "sometimes"}, "retry is 'sometimes'"),
        ({"template": ""}, "needs a message template"),
        ({"template": "the {blade} of {fan}"}, "fields that it does not declare: blade"),
        ({"suggestion": ""}, "needs a suggestion"),
        ({"__doc__": None}, "lacks the sections: Why this happens, What to do, Example"),
        ({"__doc__": PAGE.replace("Clean it.\n", "")}, "lacks the sections: What to do"),
        ({"__doc__": PAGE.replace("## Example", "## Sample")}, "lacks the sections: Example"),
        ({"__annotations__": {"fan": "int", "run_id": "str"}}, "every error already has run_id"),
        ({"__annotations__": {"fan": "int", "message": "str"}}, "every error already has message"),
    ],
    ids=lambda value: next(iter(value.items())).__repr__() if isinstance(value, dict) else "",
)
def test_a_class_that_breaks_the_contract_is_refused_with_the_reason(changes: dict[str, Any], complaint: str) -> None:
    before = dict(registry())
    with pytest.raises(TypeError, match=complaint):
        define(**changes)
    assert dict(registry()) == before


def test_a_condition_has_a_template_of_its_own_even_when_it_refines_another() -> None:
    with pytest.raises(TypeError, match="message template of its own"):
        type("Finer", (GPUMemoryError,), {"__doc__": PAGE, "__module__": __name__}, code="RUNTIME_GPU_FINER")


def test_a_subclass_of_a_condition_needs_a_code_of_its_own() -> None:
    with pytest.raises(TypeError, match="a code of its own"):
        type("Anonymous", (GPUMemoryError,), {})


def test_a_code_known_from_a_seed_needs_no_family_prefix() -> None:
    assert define(code="UI_OUTPUT_DIR_FORBIDDEN").code == "UI_OUTPUT_DIR_FORBIDDEN"
    with pytest.raises(TypeError, match="unknown family"):
        define(code="SLAO_MERGE_SLOW")


def test_aliases_and_details_are_not_inherited() -> None:
    parent = define(aliases=("HARDWARE.FAN",))
    child = type(
        "BladeError",
        (parent,),
        {
            "__doc__": PAGE,
            "__module__": __name__,
            "template": "blade {blade}",
            "__annotations__": {"blade": int},
        },
        code="RUNTIME_FAN_BLADE",
    )
    assert (child.aliases, child.fields) == ((), {"blade": "int"})
    assert child(blade=2).fan is None  # the parent's details are unknown, not an AttributeError


def test_the_same_class_may_be_defined_again_as_a_reload_does() -> None:
    first, second = define(), define()
    assert registry()["RUNTIME_FAN_STUCK"] is second is not first


def test_everything_works_without_docstrings() -> None:
    code = "from trainwarden.errors import explain_text; assert 'exit status' in explain_text('RUNTIME_GPU_OOM')"
    subprocess.run([sys.executable, "-OO", "-c", f"{code}\nimport trainwarden.errors"], check=True)
