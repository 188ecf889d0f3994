"""The commands of ``warden``. Each imports what it needs when it runs: help and ``explain`` answer at once."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainwarden.cli.options import with_common_options
from trainwarden.cli.output import Output
from trainwarden.errors import UsageError

if TYPE_CHECKING:
    from trainwarden.runs import FoundRun
    from trainwarden.train.config import ResolvedConfig, TrainConfig

app = typer.Typer(
    name="warden",
    help="Guards training runs: what can be foreseen is refused, what can be recovered is recovered exactly, and "
    "what cannot ends in one typed error with the command that resumes.",
    context_settings={"max_content_width": 100},
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
runs_app = typer.Typer(help="Look at past and present runs.", rich_markup_mode=None, add_completion=False)
app.add_typer(runs_app, name="runs")

RunReference = Annotated[str, typer.Argument(metavar="RUN", help="A run id, the beginning of one, or a run directory.")]


class Resume(StrEnum):
    """What to do about a checkpoint in the output directory."""

    AUTO = "auto"
    NEVER = "never"
    MUST = "must"


def _print_version(asked: bool) -> None:
    if asked:
        from trainwarden import __version__

        print(f"trainwarden {__version__}")
        raise typer.Exit


@app.callback()
@with_common_options
def warden(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
@with_common_options
def train(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; see configs/.")],
    override: Annotated[
        list[str] | None,
        typer.Option("-o", "--override", metavar="KEY=VALUE", help="A setting, such as trainer.max_steps=50."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show every setting and where it comes from; train nothing.")
    ] = False,
    resume: Annotated[
        Resume | None,
        typer.Option(help="Continue from a checkpoint in the output directory: if there is one, never, or only."),
    ] = None,
) -> None:
    """Fine-tune a model as CONFIG says.

    Settings come from flags, else the environment (WARDEN_TRAINER__MAX_STEPS=50), else CONFIG, else defaults.
    Ctrl-C finishes the step, writes a checkpoint and exits with 75; a second one stops at once.
    """
    from trainwarden.train.config import load_config

    overrides = [*(override or []), *([f"guard.resume={resume.value}"] if resume else [])]
    resolved = load_config(config, overrides)
    if dry_run:
        _output(context).show(lambda: _settings_text(resolved), resolved.to_dict)
    else:
        _train(_output(context), resolved.config)


def _settings_text(resolved: ResolvedConfig) -> str:
    from trainwarden.report import text

    rows = [(key, "null" if value is None else str(value), source) for key, value, source in resolved.rows()]
    return text.table(("SETTING", "VALUE", "FROM"), rows)


def _train(output: Output, config: TrainConfig) -> None:
    from trainwarden.capability.distributed import launched_ranks
    from trainwarden.report.console import Console
    from trainwarden.report.summary import summary_text
    from trainwarden.train import run_from_config

    launched = launched_ranks(os.environ)
    speaks = launched is None or launched[0] == 0  # the others of a launcher's ranks would say the same
    with Console() as console:
        result = run_from_config(config, observers=[console] if speaks else []).to_dict()
    if speaks:
        output.show(lambda: summary_text(result), lambda: result)


@app.command()
@with_common_options
def resume(context: typer.Context, run: RunReference) -> None:
    """Continue a run of `warden train`.

    It starts from the newest valid checkpoint, with the settings that the run was started with.
    """
    from trainwarden.train.config import TrainConfig

    found = _find(run)
    if found.manifest is None or found.manifest.config is None:
        raise UsageError(problem=_why_not_resumable(found), resume_command=found.resume_command)
    place = str(found.path / "run.json")
    config = TrainConfig.from_dict(
        found.manifest.config, place=place, guard__resume="must", output_dir=str(found.path.absolute())
    )
    _train(_output(context), config)


def _why_not_resumable(found: FoundRun) -> str:
    if found.resume_command is None:
        return f"the directory of this run is gone: {found.path}"
    return f"this run was started by a command of your own; that command continues it: {found.resume_command}"


@runs_app.command("ls")
@with_common_options
def list_runs(
    context: typer.Context,
    limit: Annotated[int, typer.Option("-n", "--limit", min=1, help="How many, newest first.")] = 20,
) -> None:
    """List runs, newest first."""
    from trainwarden.report.runs import runs_table
    from trainwarden.runs import Ledger

    ledger = Ledger()
    records = ledger.rows(limit)
    if not records:
        _output(context).note(f"no run has been recorded in {ledger.path}")
    _output(context).show(lambda: runs_table(records), lambda: {"runs": [record.to_dict() for record in records]})


@runs_app.command("show")
@with_common_options
def show_run(context: typer.Context, run: RunReference) -> None:
    """Show one run.

    How it went, its loss curve, what the guard did, and how to continue it.
    """
    from trainwarden.report.history import History
    from trainwarden.report.runs import page_dict, run_page
    from trainwarden.runs import read_events

    found = _find(run)
    history = History.read(read_events(found.path / "events.jsonl"))
    over = found.record is not None and found.record.status in ("finished", "running")
    resume_command = None if over else found.resume_command
    known: dict[str, Any] = {"path": str(found.path.absolute()), "resume_command": resume_command}
    _output(context).show(
        lambda: run_page(found.record, found.manifest, history, **known, unicode=_can_print_blocks()),
        lambda: page_dict(found.record, found.manifest, history, **known),
    )


def _find(reference: str) -> FoundRun:
    from trainwarden.runs import Ledger, find_run

    return find_run(reference, Ledger())


def _can_print_blocks() -> bool:
    import sys

    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"


@app.command()
@with_common_options
def watch(
    context: typer.Context,
    run: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="A run id, the beginning of one, or a run directory."),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print how things are now, and end.")] = False,
) -> None:
    """Watch devices and a run, live.

    Without RUN: the devices, and a line for each run that is running. On a terminal the view is drawn every second
    until the run has ended or Ctrl-C; elsewhere, and as JSON, it is printed once.
    """
    import sys

    from trainwarden import device
    from trainwarden.report.console import can_draw
    from trainwarden.report.watch import Watch, console_on, print_view
    from trainwarden.runs import Ledger

    output = _output(context)
    console = console_on(sys.stdout)
    if can_draw(sys.stdout) and not once and not output.json:
        with device.Sampler() as sampler:
            Watch(sampler.latest, Ledger(), run).show(console, unicode=_can_print_blocks())
        return
    view = Watch(device.snapshot, Ledger(), run).look()
    if output.json:
        output.show(str, view.to_dict)
    else:
        print_view(console, view, unicode=_can_print_blocks())


@app.command()
@with_common_options
def explain(
    context: typer.Context,
    code: Annotated[
        str | None, typer.Argument(metavar="[CODE]", help="A code such as RUNTIME_GPU_OOM, or an alias.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="List all codes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Short for --output-format json.")] = False,
) -> None:
    """Explain an error code.

    Why it happens, what to do, its exit status. Without CODE, all are listed.
    """
    from trainwarden import errors

    if code is not None and every:
        raise UsageError(problem="give a code or --all, not both")
    as_json = as_json or _output(context).json
    if code is None:
        print(errors.explain_all_json() if as_json else errors.explain_all_text())
    else:
        print(errors.explain_json(code) if as_json else errors.explain_text(code))


@app.command()
@with_common_options
def probe(
    context: typer.Context,
    require: Annotated[
        list[str] | None,
        typer.Option(metavar="REQUIREMENT", help="What must be there, such as 'vram>=80GiB', 'sm>=90' or fp8."),
    ] = None,
) -> None:
    """Show what this machine offers to a run.

    Devices, driver, versions of packages, and what it can do, found out by trying: bf16, FP8, flash attention, 8-bit
    optimizers, NCCL, FSDP with CPU offload, MLX, the Hub, Ollama. Exits with 69 when a requirement is not met; one
    that could not be found out is not met either.
    """
    from trainwarden import capability
    from trainwarden.report.environment import describe, probe_text

    report = capability.probe(require or [])
    found = describe(report)
    output = _output(context)
    if not (output.json and report.unmet):  # the failure, which holds the report, is then the one document
        output.show(lambda: probe_text(found, report), lambda: found, report.github_lines)
    report.require()


def _output(context: typer.Context) -> Output:
    output: Output = context.obj
    return output
