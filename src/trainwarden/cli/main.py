"""The one boundary: whatever goes wrong in a command becomes one report and one exit status here."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import Any

import typer

from trainwarden.cli import memory_commands
from trainwarden.cli.commands import app
from trainwarden.cli.output import Output
from trainwarden.cli.slao_commands import slao_app
from trainwarden.errors import UsageError, resolve_profile

app.add_typer(slao_app, name="slao")
memory_commands.register(app)

_ParserError: type[Exception] = typer.BadParameter.__mro__[2]
"""The base of every complaint of typer's parser: click's, which typer vendors since 0.29 without exporting it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``warden`` with ``arguments`` (by default those of the process) and return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    output = Output.wanted(words)
    profile = None
    if sys.stdout is sys.__stdout__ and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = _outlet(sys.stdout)
    try:
        profile = resolve_profile(output.profile)
        status = _run(words, output)
        sys.stdout.flush()
        return status
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - boundary: the only place that ends the process
        return output.fail(error, profile=profile)


class _Outlet(io.FileIO):
    """Standard output, whose reader may go away when it has seen enough (``| head``): the command ends as it would."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def _outlet(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    stream.flush()
    binary = io.BufferedWriter(_Outlet(stream.fileno(), "wb", closefd=False))
    # A path or a sign that the terminal's encoding does not have must not end a command.
    return io.TextIOWrapper(
        binary, encoding=stream.encoding, errors="backslashreplace", line_buffering=stream.line_buffering
    )


def _run(words: list[str], output: Output) -> int:
    command = typer.main.get_command(app)
    try:
        # Not command.main(): that makes an exit status 1 of a closed pipe, and an abort of an interrupt.
        with command.make_context("warden", words or ["--help"], obj=output) as context:
            command.invoke(context)
    except typer.Exit as ending:
        return ending.exit_code
    except _ParserError as error:
        raise UsageError(problem=_sentence(error)) from None
    return 0


def _sentence(error: Exception) -> str:
    """What the parser complains about, with the command it was parsing."""
    path = getattr(getattr(error, "ctx", None), "command_path", "warden")
    complaint: str = error.format_message()  # type: ignore[attr-defined]  # of click's exceptions
    complaint = " ".join(complaint.split()).rstrip(".") or "a command is missing"
    where = "" if path == "warden" else f"{path}: "
    return f"{where}{complaint[:1].lower()}{complaint[1:]}"


if __name__ == "__main__":
    sys.exit(main())
