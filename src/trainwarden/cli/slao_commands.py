"""``warden slao``: train and merge task after task, merge saved adapters, look at what was merged, and go back."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainwarden.cli.options import with_common_options
from trainwarden.cli.output import Output

if TYPE_CHECKING:
    from trainwarden.slao import Record, SlaoStore
    from trainwarden.slao.campaign_result import CampaignResult, TaskOutcome

slao_app = typer.Typer(
    help="Train adapters task after task and merge them into one (continual LoRA merging).",
    rich_markup_mode=None,
    add_completion=False,
)

StorePath = Annotated[Path, typer.Argument(metavar="DIR", help="A directory that `warden slao merge` wrote.")]


class Mode(StrEnum):
    """How an adapter goes into those before it."""

    SLAO = "slao"
    AVERAGE = "average"
    TIES = "ties"
    DARE = "dare"


class Schedule(StrEnum):
    """How much of the i-th adapter is taken."""

    INVERSE_SQRT = "inverse_sqrt"
    INVERSE = "inverse"
    INVERSE_LOG = "inverse_log"
    CONSTANT = "constant"


@slao_app.command("run")
@with_common_options
def run_campaign(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; see configs/slao.yaml.")],
    override: Annotated[
        list[str] | None,
        typer.Option(
            "-o", "--override", metavar="KEY=VALUE", help="A setting, such as tasks.law.trainer.max_steps=50."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show every setting and where it comes from; train nothing.")
    ] = False,
) -> None:
    """Train on one data set after the other, as CONFIG says, and merge each adapter into one.

    Each task is a run of its own in OUTPUT_DIR/tasks; the merged adapter is in OUTPUT_DIR/merged. Stopped anywhere
    (Ctrl-C: 75), the same command goes on; what is done is not done again. With on_failure: stop the failure of a task
    ends the campaign; with continue the others go on and the status is 85.
    """
    from trainwarden.errors import PartialBatchError
    from trainwarden.report.console import Console
    from trainwarden.slao.campaign import Campaign
    from trainwarden.slao.campaign_config import load_campaign

    out = _output(context)
    loaded = load_campaign(config, override or [])
    if dry_run:
        out.show(lambda: _settings_text(loaded.rows), loaded.to_dict)
        return
    words = ["warden", "slao", "run", str(config), *(word for one in override or [] for word in ("-o", one))]
    with Console() as console:
        campaign = Campaign(loaded, observers=[console], command=shlex.join(words))
        try:
            result = campaign.run()
        except PartialBatchError:
            if not out.json:  # the failure, which lists the tasks, is then the one document
                print(_campaign_text(campaign.result()))
            raise
    out.show(lambda: _campaign_text(result), result.to_dict)


def _settings_text(rows: Sequence[tuple[str, object, str]]) -> str:
    from trainwarden.report import text

    shown = [(key, "null" if value is None else str(value), source) for key, value, source in rows]
    return text.table(("SETTING", "VALUE", "FROM"), shown)


def _campaign_text(result: CampaignResult) -> str:
    from trainwarden.report import text

    names = [task.name for task in result.tasks]
    headers = ["TASK", "STATE", "WEIGHT", "SNAPSHOT", *(f"LOSS {name}" for name in names), "RUN"]
    rows = [_campaign_row(task, names) for task in result.tasks]
    right = frozenset({"WEIGHT", "SNAPSHOT", *(f"LOSS {name}" for name in names)})
    merged = sum(task.state == "merged" for task in result.tasks)
    return (
        f"{text.table(headers, rows, right)}\n\n"
        f"{result.merged_path} holds {_adapters(merged)} merged into one. "
        f'Load it with PeftModel.from_pretrained(model, "{result.merged_path}").'
    )


def _campaign_row(task: TaskOutcome, names: Sequence[str]) -> list[str]:
    from trainwarden.report import text

    losses = task.losses or {}
    return [
        task.name,
        task.code or task.state,
        "-" if task.weight is None else f"{task.weight:.4f}",
        "-" if task.snapshot is None else str(task.snapshot),
        *(text.number(losses[name]) if name in losses else "-" for name in names),
        task.run_dir or "-",
    ]


@slao_app.command("merge")
@with_common_options
def merge_adapters(
    context: typer.Context,
    adapters: Annotated[
        list[Path],
        typer.Argument(metavar="ADAPTER...", help="Adapter directories in the order in which they were trained."),
    ],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Where the merged adapter goes.")],
    mode: Annotated[Mode, typer.Option(help="SLAO replaces A and moves B; the others treat both alike.")] = Mode.SLAO,
    schedule: Annotated[
        Schedule, typer.Option(help="The weight λ of the i-th adapter: 1/√i, 1/i, 1/ln(i+1), or --constant.")
    ] = Schedule.INVERSE_SQRT,
    constant: Annotated[float, typer.Option(help="λ for --schedule constant, above 0 and at most 1.")] = 1.0,
    density: Annotated[float, typer.Option(help="Share of the entries that ties and dare keep.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of what dare drops.")] = 0,
    max_norm_growth: Annotated[
        float, typer.Option(help="A tensor whose norm grows by more than this factor in one merge has diverged.")
    ] = 10.0,
) -> None:
    """Merge ADAPTERs in their order into one that plain peft loads.

    The first is the start, the i-th comes in with the weight λ(i). All are checked before anything is written: when
    one does not fit (65) or has diverged (80), DIR is as it was. A first ADAPTER that is itself the output of a merge
    is continued; give it as DIR too to continue in place.
    """
    from trainwarden import slao

    out = _output(context)
    policy = slao.MergePolicy(mode.value, schedule.value, constant, density, seed, max_norm_growth)
    snapshot, steps = slao.merge_adapters(adapters, output, policy, on_rejected=_noting(out))
    for step in steps:
        for note in step.notes:
            out.note(note)
    document = {
        "output": str(output),
        "snapshot": snapshot.sequence,
        "index": snapshot.index,
        "merges": [step.record.to_json() for step in steps],
        "notes": [note for step in steps for note in step.notes],
    }
    out.show(
        lambda: (
            f"{_table([step.record for step in steps])}\n\n"
            f"{output} holds {snapshot.index} adapters merged into one, as snapshot {snapshot.sequence}. "
            f'Load it with PeftModel.from_pretrained(model, "{output}").'
        ),
        lambda: document,
    )


@slao_app.command("history")
@with_common_options
def show_history(context: typer.Context, directory: StorePath) -> None:
    """Show what was merged into DIR, and which snapshots are kept.

    Every snapshot is verified.
    """
    from trainwarden import slao

    out = _output(context)
    store = slao.SlaoStore(directory, on_rejected=_noting(out))
    records = store.history()
    exported = store.exported_sequence
    out.show(
        lambda: _history_text(store, records, exported),
        lambda: {
            "path": str(directory),
            "exported_snapshot": exported,
            "history": [record.to_json() | {"kept": record.kept} for record in records],
        },
    )


@slao_app.command("rollback")
@with_common_options
def roll_back(
    context: typer.Context,
    directory: StorePath,
    to: Annotated[int, typer.Option("--to", metavar="SNAPSHOT", min=1, help="A number that `history` shows as kept.")],
) -> None:
    """Go back to an earlier snapshot of DIR, and export it.

    It becomes the newest one under a new number, so this too can be rolled back.
    """
    from trainwarden import slao

    out = _output(context)
    store = slao.SlaoStore(directory, on_rejected=_noting(out))
    snapshot = store.rollback(to)
    out.show(
        lambda: (
            f"{directory} is snapshot {to} again: {_adapters(snapshot.index)}. It is now snapshot {snapshot.sequence}, "
            "and exported."
        ),
        snapshot.history[-1].to_json,
    )


def _history_text(store: SlaoStore, records: Sequence[Record], exported: int | None) -> str:
    if not records:
        return f"nothing has been merged into {store.path} yet"
    current = next(record for record in records if record.kept == "current")
    lines = [_table(records, kept=True), ""]
    if exported == current.sequence:
        lines.append(f"The adapter in {store.path} is snapshot {exported}.")
    else:
        behind = "is missing or incomplete" if exported is None else f"is still snapshot {exported}"
        command = f"warden slao rollback {store.path} --to {current.sequence}"
        lines.append(f"The adapter in {store.path} {behind}: the merge was interrupted. Export it with: {command}")
    return "\n".join(lines)


def _table(records: Sequence[Record], *, kept: bool = False) -> str:
    from trainwarden.report import text

    headers = ["SNAPSHOT", "WHAT", "ADAPTERS", "FROM", "WEIGHT", "LINEAGE", "B BEFORE", "B INCOMING", "B AFTER"]
    rows = [[cell(record) for cell in _CELLS] for record in records]
    if kept:
        headers.append("STATE")
        rows = [[*row, record.kept] for row, record in zip(rows, records, strict=True)]
    right = frozenset({"SNAPSHOT", "ADAPTERS", "WEIGHT", "B BEFORE", "B INCOMING", "B AFTER"})
    return text.table(headers, rows, right)


def _norm(name: str) -> Callable[[Record], str]:
    def cell(record: Record) -> str:
        starts = record.action == "start" and name != "after"
        return "-" if starts or record.action == "rollback" else f"{record.norms[name]:.4g}"

    return cell


def _lineage(record: Record) -> str:
    if record.action != "merge":
        return "-"
    return "recorded" if record.recorded_lineage else f"overlap {record.overlap or 0.0:.2f}"


_CELLS: Sequence[Callable[[Record], str]] = (
    lambda record: str(record.sequence),
    lambda record: record.mode if record.action == "merge" else record.action,
    lambda record: str(record.index),
    lambda record: record.source,
    lambda record: f"{record.weight:.4f}" if record.action == "merge" else "-",
    _lineage,
    _norm("before"),
    _norm("incoming"),
    _norm("after"),
)


def _adapters(count: int) -> str:
    return "1 adapter" if count == 1 else f"{count} adapters"


def _noting(out: Output) -> Callable[[Path, str], None]:
    said: set[Path] = set()

    def note(path: Path, reason: str) -> None:
        if path not in said:
            said.add(path)
            out.note(f"{path} is damaged and was passed over: {reason}")

    return note


def _output(context: typer.Context) -> Output:
    output: Output = context.obj
    return output
