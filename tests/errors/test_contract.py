"""The contract as a whole: nothing renamed, nothing undocumented, nothing impossible, nothing untried."""

from __future__ import annotations

import ast
import builtins
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import trainwarden.errors
from trainwarden.errors import WardenError, explain_json, registry
from trainwarden.errors.generate import differences
from trainwarden.errors.pages import sections_of

from .provoked import provoked_in, raised_in

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "trainwarden"
CONTEXT = {"suggestion", "run_id", "steps_completed", "checkpoint_path", "resume_command"}
FROZEN = Path(__file__).with_name("frozen_codes.json")

MAY_BE_RAISED_ANYWHERE = {
    "TypeError": "the caller's program is wrong: an argument of a type that the signature excludes",
    "NotImplementedError": "the caller's program is wrong: an abstract method",
    "AttributeError": "the protocol of __getattr__",
    "StopIteration": "the protocol of __next__",
    "SystemExit": "the exit status at the end of the command line",
}
MAY_BE_RAISED_IN: dict[str, dict[str, str]] = {
    "checkpoint": {"ValueError": "private parsers; the public function makes it a CheckpointError with the path"},
    "guards/oom.py": {"ValueError": "an arithmetic precondition that only our own code can break"},
    "memory/prediction.py": {"ValueError": "an arithmetic precondition that only our own code can break"},
    "memory/trace_record.py": {"RuntimeError": "private; a trace that cannot be finished says why and falls back"},
    "memory/trace.py": {"AssertionError": "unreachable: the last attempt returns or raises"},
    "runtime/sharded.py": {"ValueError": "as load_state_dict does; the caller makes it a CheckpointError"},
    "runtime/signals.py": {"KeyboardInterrupt": "the second signal: what Python itself would have raised"},
    "runtime/split.py": {"ValueError": "an arithmetic precondition that only our own code can break"},
    "runtime/watched.py": {"KeyError": "as load_state_dict does; the caller makes it a CheckpointError"},
    "train/config.py": {"ValueError": "the protocol of pydantic validators; loading makes it our error"},
    "train/encode.py": {"ValueError": "private; the caller makes it a DatasetValidationError with the line"},
}


def ours() -> dict[str, type[WardenError]]:
    """The conditions of the package itself, without any that a test has defined."""
    return {code: cls for code, cls in registry().items() if cls.__module__.startswith("trainwarden.")}


def modules(folder: Path) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(folder.rglob("*.py")):
        yield path.relative_to(folder).as_posix(), ast.parse(path.read_text(encoding="utf-8"), str(path))


def test_the_list_of_codes_aliases_and_exit_statuses_is_frozen() -> None:
    frozen = json.loads(FROZEN.read_text(encoding="utf-8"))
    now = {
        code: {"class": cls.__name__, "exit": cls.exit_code, "aliases": list(cls.aliases)}
        for code, cls in ours().items()
    }
    broken = {code: row for code, row in frozen.items() if now.get(code) != row}
    assert not broken, (
        f"these were published and are no longer as they were: {broken}. Others search logs and branch on "
        "them; a new meaning needs a new code, and a removed alias stays an alias."
    )
    added = {code: row for code, row in sorted(now.items()) if code not in frozen}
    assert not added, f"new codes are published by adding them to {FROZEN.name}:\n{json.dumps(added, indent=2)}"
    assert list(frozen) == sorted(frozen)


def test_every_code_has_its_page_and_the_pages_are_up_to_date() -> None:
    found = differences(ROOT / "docs" / "errors")
    assert not found, "run python -m trainwarden.errors.generate\n" + "\n".join(found[:20])


def test_the_source_raises_every_code() -> None:
    raised = set().union(*(raised_in(tree) for _, tree in modules(SOURCE)))
    missing = sorted(code for code, cls in ours().items() if cls.__name__ not in raised)
    assert not missing, f"a code that nothing can raise does not exist; nothing in src raises {', '.join(missing)}"


def test_a_test_provokes_every_code() -> None:
    raised_by_errors = set().union(*(raised_in(tree) for _, tree in modules(SOURCE / "errors")))
    provoked: set[str] = set()
    for path, tree in modules(ROOT / "tests"):
        found = provoked_in(tree, ours())
        # Here any error is raised for show; only what this room raises itself is provoked here.
        provoked |= {
            code for code in found if not path.startswith("errors/") or ours()[code].__name__ in raised_by_errors
        }
    missing = sorted(set(ours()) - provoked)
    assert not missing, (
        f"no test provokes {', '.join(missing)}: write pytest.raises(TheClass) around the real fault, or "
        "assert the code in what a command printed"
    )


def _builtin_raises(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise):
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = raised.id if isinstance(raised, ast.Name) else ""
            kind = getattr(builtins, name, None)
            if isinstance(kind, type) and issubclass(kind, BaseException):
                yield node.lineno, name


def _reason(path: str, name: str) -> str | None:
    if path.startswith("errors/"):
        return "the contract itself: a wrong class is refused with TypeError"
    local = [names for place, names in MAY_BE_RAISED_IN.items() if path == place or path.startswith(f"{place}/")]
    return MAY_BE_RAISED_ANYWHERE.get(name) or next((names[name] for names in local if name in names), None)


def test_the_source_raises_our_own_errors_and_no_bare_builtins() -> None:
    wrong = [
        f"src/trainwarden/{path}:{line}: raise {name}"
        for path, tree in modules(SOURCE)
        for line, name in _builtin_raises(tree)
        if _reason(path, name) is None
    ]
    assert not wrong, (
        "raise the condition from trainwarden.errors that says what happened, so that it has a code, an exit "
        "status and a page; or give the reason in MAY_BE_RAISED_IN:\n" + "\n".join(wrong)
    )


def test_every_error_is_raised_with_the_details_that_it_declares() -> None:
    conditions = {cls.__name__: cls for cls in ours().values()}
    wrong = []
    for path, tree in modules(SOURCE):
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = getattr(call.func, "id", getattr(call.func, "attr", ""))
            if name in conditions:
                wrong += [f"{path}:{call.lineno}: {name} {what}" for what in _misfits(call, conditions[name])]
    assert not wrong, "\n".join(wrong)


def _misfits(call: ast.Call, condition: type[WardenError]) -> list[str]:
    given = {keyword.arg for keyword in call.keywords}
    if None in given:  # **details: known only when it runs
        return []
    always_said = set(re.findall(r"\{(\w+)\}", re.sub(r"\[[^\[\]]*\]", "", condition.template)))
    undeclared = sorted(map(str, given - CONTEXT - set(condition.fields)))
    return [
        *(f"does not declare {name}" for name in undeclared),
        *(f"cannot say its message without {name}" for name in sorted(always_said - given)),
        *(["takes keywords only"] if call.args else []),
    ]


def test_no_exemption_outlives_its_reason() -> None:
    used = {(path, name) for path, tree in modules(SOURCE) for _, name in _builtin_raises(tree)}
    for place, names in MAY_BE_RAISED_IN.items():
        for name in names:
            assert any(name == n and (p == place or p.startswith(f"{place}/")) for p, n in used), f"{place}: {name}"


def test_the_hierarchy_is_drawn_as_it_is() -> None:
    def below(cls: type[WardenError], depth: int) -> Iterator[tuple[int, str]]:
        yield depth, cls.__name__
        for child in cls.__subclasses__():
            if child.__module__.startswith("trainwarden."):
                yield from below(child, depth + 1)

    document = trainwarden.errors.__doc__ or ""
    drawn = [(len(branch) // 4, name) for branch, name in re.findall(r"(?m)^    ([ │├└─]*)(\w+)", document)]
    assert sorted(drawn) == sorted(below(WardenError, 0))
    for code, cls in ours().items():
        assert re.search(rf"{cls.__name__} +{code}$", document, re.MULTILINE), f"the tree lacks {cls.__name__} {code}"


def test_everything_that_can_be_raised_or_caught_is_exported() -> None:
    exported = set(trainwarden.errors.__all__)
    assert {cls.__name__ for cls in ours().values()} <= exported
    assert {name for name in exported if not hasattr(trainwarden.errors, name)} == set()
    assert trainwarden.errors.__all__ == sorted(trainwarden.errors.__all__, key=_export_order)


def _export_order(name: str) -> tuple[int, str]:
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def _as_pattern(template: str) -> str:
    pattern = re.sub(r"\\\{\w+\\\}", "(.+)", re.escape(template))
    return re.sub(r"\\\[(.*?)\\\]", r"(?:\1)?", pattern)


@pytest.mark.parametrize("code", sorted(ours()))
def test_the_example_shows_the_message_as_it_really_reads_and_what_to_type(code: str) -> None:
    example = sections_of(ours()[code].__doc__ or "")["Example"]
    shown = [line for line in example.splitlines() if line.startswith("warden: ")]
    assert len(shown) == 1
    assert re.fullmatch(f"warden: {_as_pattern(ours()[code].template)}", shown[0]), shown[0]
    assert re.search(r"^(\$ |guard|loss)", example.partition(shown[0])[2], re.MULTILINE), "say what to type next"


@pytest.mark.parametrize("code", sorted(ours()))
def test_a_page_is_short_and_names_no_missing_code(code: str) -> None:
    page = json.loads(explain_json(code))
    assert len(page["summary"]) < 100
    assert page["summary"].endswith(".")
    assert page["suggestion"].endswith(".")
    assert all(len(text) < 1000 for text in page["sections"].values())
    mentioned = set(re.findall(r"warden explain ([A-Z_]{6,})", ours()[code].__doc__ or ""))
    assert mentioned <= {*registry(), "RUNTIME_GPU_OM"}
