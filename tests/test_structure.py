"""The house: who may import whom, what stays light, and how large things may grow."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "trainwarden"

ROOMS = (
    "errors",
    "events",
    "device",
    "capability",
    "memory",
    "guards",
    "checkpoint",
    "runs",
    "runtime",
    "train",
    "slao",
    "supervise",
    "integrations",
    "report",
    "cli",
    "testing",
)
"""A file may import from its own room and from those before it."""

STANDARD_LIBRARY_ONLY = ("errors", "events")
CORE = ROOMS[: ROOMS.index("runtime") + 1]
CORE_PACKAGES = {"torch", "safetensors", "pynvml", "psutil", "numpy"}
"""A guard can be dropped into any training image: up to `runtime`, nothing but these (numpy comes with torch)."""

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80
MAX_BROAD_EXCEPTS = 18
"""Each at a boundary to foreign code (drivers, observers, model classes, templates, data sets), with its reason."""

FILES = sorted(SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Absolute names of everything a file imports anywhere, with the line."""
    package = ["trainwarden", *path.relative_to(SOURCE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield node.lineno, ".".join([*base, *([node.module] if node.module else [])])


def named(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


@pytest.mark.parametrize("path", [p for p in FILES if p.name != "__init__.py" or p.parent != SOURCE], ids=named)
def test_imports_point_upwards(path: Path) -> None:
    own = room_of(path)
    assert own in ROOMS, f"{own} is no room of the house"
    allowed = set(ROOMS[: ROOMS.index(own) + 1])
    wrong = [
        f"line {line}: {name}"
        for line, name in imports_of(path)
        if name.startswith("trainwarden.") and name.split(".")[1] not in allowed
    ]
    assert not wrong, f"{named(path)} may not import from rooms below {own}: {wrong}"


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) in CORE], ids=named)
def test_the_core_needs_little(path: Path) -> None:
    packages = set() if room_of(path) in STANDARD_LIBRARY_ONLY else CORE_PACKAGES
    foreign = {
        name.split(".")[0]
        for _, name in imports_of(path)
        if name.split(".")[0] not in sys.stdlib_module_names and name.split(".")[0] != "trainwarden"
    }
    assert foreign <= packages


@pytest.mark.parametrize(
    "statement",
    [
        "import trainwarden",
        "import trainwarden.errors",
        "import trainwarden.events",
        "import trainwarden.device",
        "from trainwarden.cli.main import main; main(['--help'])",
        "from trainwarden.cli.main import main; main(['train', '--help'])",
        "from trainwarden.cli.main import main; main(['explain', 'RUNTIME_GPU_OOM'])",
    ],
)
def test_torch_is_imported_only_when_it_is_used(statement: str) -> None:
    script = f"import sys\ntry:\n    {statement}\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_are_those_that_are_listed() -> None:
    import trainwarden

    for name in trainwarden.__all__:
        assert getattr(trainwarden, name) is not None
    assert dir(trainwarden) == sorted(trainwarden.__all__)
    with pytest.raises(AttributeError, match="no attribute"):
        _ = trainwarden.Gard  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", FILES, ids=named)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE_LINES
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno}
    assert max(long.values(), default=0) <= MAX_FUNCTION_LINES, long


def test_broad_excepts_are_few_and_give_their_reason() -> None:
    found = []
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ExceptHandler) and getattr(node.type, "id", "bare") in ("Exception", "bare"):
                if isinstance(node.type, (ast.Tuple, ast.Attribute)):
                    continue
                found.append((f"{named(path)}:{node.lineno}", text.splitlines()[node.lineno - 1]))
    assert all("#" in line for _, line in found), found
    assert len(found) <= MAX_BROAD_EXCEPTS, found
