"""Options that every command takes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from trainwarden.cli.output import DEBUG_VARIABLE, Format

_COMMON: dict[str, tuple[Any, Any]] = {
    "output_format": (
        Annotated[Format, typer.Option(help="What stdout gets; failures too are one document in json.")],
        Format.TEXT,
    ),
    "exit_profile": (
        Annotated[
            str | None,
            typer.Option(
                metavar="PROFILE",
                help="Whose exit statuses: warden, backpropagate or genolewm [env var: WARDEN_EXIT_PROFILE].",
            ),
        ],
        None,
    ),
    "debug": (
        Annotated[bool, typer.Option("--debug", help=f"Print tracebacks [env var: {DEBUG_VARIABLE}].")],
        False,
    ),
}


def with_common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command accept, and list in its help, what `Output.wanted` has read from the arguments already."""

    @functools.wraps(command)
    def accepting(**values: Any) -> None:
        command(**{name: value for name, value in values.items() if name not in _COMMON})

    own = inspect.signature(command, eval_str=True)
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in _COMMON.items()
    ]
    accepting.__signature__ = own.replace(  # type: ignore[attr-defined]  # typer reads the signature
        parameters=[
            *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own.parameters.values()),
            *extra,
        ]
    )
    accepting.__annotations__ = {p.name: p.annotation for p in (*own.parameters.values(), *extra)}
    return accepting
