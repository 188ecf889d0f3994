"""Read from source which conditions are raised, and from tests which are provoked."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

from trainwarden.errors import WardenError

_Scope = ast.FunctionDef | ast.AsyncFunctionDef | ast.Module


def raised_in(tree: ast.Module) -> set[str]:
    """Names of classes that `tree` raises, or makes in a function that raises or returns what it made."""
    return {name for scope in _scopes(tree) for name in _raised_in_scope(scope)}


def provoked_in(tree: ast.Module, conditions: Mapping[str, type[WardenError]]) -> set[str]:
    """Codes that the tests in `tree` provoke.

    By ``pytest.raises(TheClass)``, or by an ``assert`` that names the class or the code, as tests of a
    command do with what it printed.
    """
    code_of = {cls.__name__: code for code, cls in conditions.items()}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _name(node.func) == "raises":
            found |= {code_of[name] for argument in node.args[:1] for name in _names(argument) if name in code_of}
        if isinstance(node, ast.Assert):
            found |= {code_of[name] for name in _names(node.test) if name in code_of}
            found |= {text for text in _texts(node.test) if text in conditions}
    return found


def _raised_in_scope(scope: _Scope) -> Iterator[str]:
    variables: dict[str, set[str]] = {}
    for node in _own_nodes(scope):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                variables.setdefault(_name(target), set()).update(_calls(node.value))
    for node in _own_nodes(scope):
        value = node.exc if isinstance(node, ast.Raise) else node.value if isinstance(node, ast.Return) else None
        if value is not None:
            yield from _calls(value)
            for name in _names(value):
                yield from variables.get(name, ())


def _scopes(tree: ast.Module) -> Iterator[_Scope]:
    yield tree
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _own_nodes(scope: _Scope) -> Iterator[ast.AST]:
    # Not those of functions inside: they are scopes of their own.
    pending: list[ast.AST] = list(ast.iter_child_nodes(scope))
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending += ast.iter_child_nodes(node)


def _calls(node: ast.AST) -> set[str]:
    return {_name(inner.func) for inner in ast.walk(node) if isinstance(inner, ast.Call)}


def _names(node: ast.AST) -> set[str]:
    return {_name(inner) for inner in ast.walk(node) if isinstance(inner, ast.Name | ast.Attribute)}


def _texts(node: ast.AST) -> set[str]:
    return {inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant) and isinstance(inner.value, str)}


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
