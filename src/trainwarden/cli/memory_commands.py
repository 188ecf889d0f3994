"""`warden preflight` and `warden ceilings`. Help answers without torch; each imports what it needs when it runs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainwarden.cli.options import with_common_options
from trainwarden.cli.output import Output
from trainwarden.errors import UsageError

if TYPE_CHECKING:
    from trainwarden.memory.overheads import DeviceMemory, Overheads
    from trainwarden.train.subject import Subject


class ModeChoice(StrEnum):
    """Which weights are trained."""

    FULL = "full"
    LORA = "lora"
    QLORA = "qlora"


class OptimizerChoice(StrEnum):
    """Whose states are kept, and how they are stepped."""

    ADAMW_FUSED = "adamw_fused"
    ADAMW_FOREACH = "adamw_foreach"
    ADAMW_8BIT = "adamw_8bit"
    PAGED_ADAMW_8BIT = "paged_adamw_8bit"
    SGD = "sgd"


class DtypeChoice(StrEnum):
    """A type of the model's weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


GpuOption = Annotated[str | None, typer.Option("--gpu", metavar="NAME", help="A card, such as 'RTX 4090' or H100.")]
VramOption = Annotated[str | None, typer.Option("--vram", metavar="SIZE", help="Its memory instead, such as 24GiB.")]
Flag = bool | None


def register(app: typer.Typer) -> None:
    """Adds the commands of this file to ``warden``."""
    app.command()(with_common_options(preflight))
    app.command()(with_common_options(ceilings))


def preflight(
    context: typer.Context,
    subject: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|MODEL",
            help="A training configuration, a model directory, a config.json, or a Hub name that is in the cache.",
        ),
    ],
    gpu: GpuOption = None,
    vram: VramOption = None,
    mode: Annotated[ModeChoice | None, typer.Option(help="Train all weights, adapters, or adapters on 4 bits.")] = None,
    rows: Annotated[int | None, typer.Option("--batch-size", min=1, help="Rows of a micro-batch.")] = None,
    tokens: Annotated[int | None, typer.Option("--max-length", min=2, help="Tokens of a row.")] = None,
    accumulated: Annotated[int | None, typer.Option("--grad-accum-steps", min=1, help="Micro-batches a step.")] = None,
    optimizer: Annotated[OptimizerChoice | None, typer.Option(help="The optimizer.")] = None,
    weights: Annotated[DtypeChoice | None, typer.Option(help="Type in which the model is held.")] = None,
    checkpointing: Annotated[
        Flag, typer.Option("--gradient-checkpointing/--no-gradient-checkpointing", help="Run blocks twice.")
    ] = None,
    chunk: Annotated[
        int | None, typer.Option("--loss-chunk-tokens", min=1, help="Tokens whose logits are held at a time.")
    ] = None,
    offload: Annotated[Flag, typer.Option("--offload/--no-offload", help="FSDP with CPU offload.")] = None,
    lora_rank: Annotated[int | None, typer.Option("--lora-rank", min=1, help="Of the adapters.")] = None,
    override: Annotated[
        list[str] | None, typer.Option("-o", "--override", metavar="KEY=VALUE", help="A setting of CONFIG.")
    ] = None,
    waive: Annotated[
        list[str] | None, typer.Option("--waive", metavar="CODE", help="A finding that is to refuse nothing.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Closed form only: at once, and less exact.")] = False,
    picture: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Write the picture as PNG or SVG.")
    ] = None,
) -> None:
    """Tell whether a training fits in memory.

    The peak of two training steps is predicted by running the real model on fake tensors: no GPU, no weights, no
    download. Says whether it fits, by how much and why, the largest micro-batch and the longest sequence, and the
    cheapest change that makes it fit. Without --gpu and --vram it is judged by this machine. Exits with 78 when it
    does not fit.
    """
    from trainwarden.report import memory_chart

    output = _output(context)
    if picture is not None:
        memory_chart.check_plot_path(picture)
    device, overheads, bfloat16 = _device(gpu, vram, output)
    changes = {
        "micro_batch_size": rows,
        "sequence_length": tokens,
        "grad_accum_steps": accumulated,
        "optimizer": None if optimizer is None else optimizer.value,
        "checkpointing": checkpointing,
        "loss_chunk_tokens": chunk,
        "offload": offload,
        "lora_rank": lora_rank,
    }
    asked = _subject(subject, override or [], mode, weights, bfloat16, changes)
    if asked.on_cpu and gpu is None and vram is None:
        device, overheads = _host()
    _answer(output, asked, device, overheads, waive=waive or [], traced=not quick, picture=picture)


def _subject(
    reference: str,
    overrides: list[str],
    mode: ModeChoice | None,
    weights: DtypeChoice | None,
    bfloat16: bool,
    changes: dict[str, Any],
) -> Subject:
    from trainwarden.train.subject import read_subject, under_mode

    subject = read_subject(reference, overrides, bfloat16=bfloat16)
    if mode is not None and mode.value != subject.plan.mode:
        subject = under_mode(subject, mode.value, bfloat16=bfloat16)
    if weights is not None:
        held = weights.value
        changes = {**changes, "weights": held, "autocast": None if held != "float32" else subject.plan.autocast}
    return subject.having(**{name: value for name, value in changes.items() if value is not None or name == "autocast"})


def _answer(
    output: Output,
    subject: Subject,
    device: DeviceMemory | None,
    overheads: Overheads,
    *,
    waive: list[str],
    traced: bool,
    picture: Path | None,
) -> None:
    from trainwarden.device import host_memory
    from trainwarden.report import memory_chart
    from trainwarden.report.memory import preflight_text
    from trainwarden.train.preflight import fitting_cards
    from trainwarden.train.preflight import preflight as look_ahead

    report = look_ahead(
        subject,
        device=device,
        overheads=overheads,
        host_bytes=host_memory().available_bytes,
        waive=waive,
        traced=traced,
    )
    if picture is not None:
        memory_chart.plot(report, picture)
        output.note(f"the picture is in {picture}")

    def as_text() -> str:
        chart = memory_chart.terminal_chart(report, **_terminal())
        return preflight_text(report, chart, fitting_cards(report.needed_bytes))

    if not (output.json and report.findings.refusing):  # the failure, which holds the report, is then the one document
        output.show(as_text, report.to_dict, report.findings.github_lines)
    report.require()


def ceilings(
    context: typer.Context,
    gpu: GpuOption = None,
    vram: VramOption = None,
    every: Annotated[bool, typer.Option("--all", help="The common cards, one of each size.")] = False,
) -> None:
    """Tell how large a model a card can train, by technique.

    In billions of parameters, by the closed form. Without --gpu and --vram it is this machine's GPU; where there is
    none, the common cards.
    """
    from trainwarden.memory.cards import COMMON, find_card
    from trainwarden.memory.ceilings import ceilings as solve
    from trainwarden.memory.overheads import Overheads
    from trainwarden.report import memory as words

    output = _output(context)
    if every and (gpu or vram):
        raise UsageError(problem="give --all, or one card by --gpu or --vram")
    device, overheads = (None, Overheads()) if every else _device(gpu, vram, output)[:2]
    if device is None:
        cards = [find_card(name) for name in COMMON]
        sizes = {card.name: card.memory_bytes for card in cards}
        rows = {name: solve(size, overheads) for name, size in sizes.items()}
        document: dict[str, Any] = {name: {"memory_bytes": sizes[name], "billions": rows[name]} for name in rows}
        shown = words.ceilings_text(rows, sizes, overheads.source)
    else:
        values = solve(device.available_bytes, overheads)
        document = {device.name: {"memory_bytes": device.available_bytes, "billions": values}}
        shown = words.ceilings_one_text(device.name, device.available_bytes, values, overheads.source)
    output.show(lambda: shown, lambda: {"techniques": words.technique_dicts(), "cards": document})


def _device(gpu: str | None, vram: str | None, output: Output) -> tuple[DeviceMemory | None, Overheads, bool]:
    """The memory to judge by, its overheads, and whether the device computes in bfloat16."""
    from trainwarden.memory.cards import UnknownCardError, find_card
    from trainwarden.memory.overheads import DeviceMemory

    if gpu is not None and vram is not None:
        raise UsageError(problem="give --gpu or --vram, not both")
    if vram is not None:
        return DeviceMemory(name=f"a device with {vram}", total_bytes=_size(vram)), _overheads("", output), True
    if gpu is None:
        found = _here()
        return found, _overheads(found.name if found else "", output), True
    try:
        card = find_card(gpu)
    except UnknownCardError as error:
        near = f"; closest are {', '.join(error.closest)}" if error.closest else ""
        raise UsageError(problem=f"no card is known as {gpu!r}{near}; --vram takes any size") from error
    return DeviceMemory(name=card.name, total_bytes=card.memory_bytes), _overheads(card.name, output), card.bfloat16


def _host() -> tuple[DeviceMemory, Overheads]:
    """What a training on the CPU may use: tensors lie beside everything else in host memory."""
    from trainwarden.device import host_memory
    from trainwarden.memory.overheads import NO_OVERHEADS, DeviceMemory

    memory = host_memory()
    others = memory.total_bytes - memory.available_bytes
    return DeviceMemory(name="host memory", total_bytes=memory.total_bytes, others_bytes=others), NO_OVERHEADS


def _size(vram: str) -> int:
    from trainwarden.capability.requirements import KINDS

    size = KINDS["vram"].read(vram.strip())
    if not isinstance(size, int) or size <= 0:
        raise UsageError(problem=f"--vram takes {KINDS['vram'].expected}, not {vram!r}")
    return size


def _here() -> DeviceMemory | None:
    """The first GPU of this machine, by its driver; None where there is none."""
    from trainwarden import device
    from trainwarden.memory.overheads import DeviceMemory

    for one in device.list_devices().devices:
        reading = one.read()
        total, used = device.known(reading.memory_total_bytes), device.known(reading.memory_used_bytes)
        if total:
            return DeviceMemory(name=reading.name, total_bytes=total, others_bytes=used or 0, source="by its driver")
    return None


def _overheads(name: str, output: Output) -> Overheads:
    """Calibrated by this machine's finished runs on the device; a ledger that cannot be read calibrates nothing."""
    from trainwarden.errors import LedgerError
    from trainwarden.memory.overheads import Overheads, calibrated
    from trainwarden.runs import Ledger

    if not name:
        return Overheads()
    try:
        return calibrated(Ledger().memory_of_runs(), name)
    except LedgerError as error:
        output.note(f"overheads are assumed: {error.message}")
        return Overheads()


def _terminal() -> dict[str, Any]:
    import os
    import shutil
    import sys

    can_print_blocks = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    width = min(100, shutil.get_terminal_size((80, 24)).columns)
    return {"width": width, "unicode": can_print_blocks, "colour": colour}


def _output(context: typer.Context) -> Output:
    output: Output = context.obj
    return output
