"""The picture of a prediction: bars in a terminal, and the same as PNG or SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainwarden.errors import UsageError
from trainwarden.memory.prediction import KINDS, PHASES, Kind
from trainwarden.report.text import size

if TYPE_CHECKING:
    from rich.text import Text

    from trainwarden.train.preflight import PreflightReport

GIB = 2**30
KIND_NAMES: Mapping[Kind, str] = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer_states": "optimizer states",
    "activations": "activations",
    "logits_and_loss": "logits and loss",
    "temporaries": "temporaries",
}
COLOURS: Mapping[Kind, str] = {
    "weights": "#4477aa",
    "gradients": "#66ccee",
    "optimizer_states": "#228833",
    "activations": "#ccbb44",
    "logits_and_loss": "#ee6677",
    "temporaries": "#aa3377",
}
"""Paul Tol's "bright" scheme, which stays apart for colour-blind eyes."""
OVERHEAD_COLOUR = "#999999"
PHASE_COLOUR = "#d8d8d8"
OVERHEAD_NAME = "overheads"
FORMATS = (".png", ".svg")
LETTERS: Mapping[Kind, str] = dict(zip(KINDS, "WGOALT", strict=True))
"""What stands for a kind where there are no colours."""
_PHASE_LETTER, _OVERHEAD_LETTER = "=", "."


@dataclass(frozen=True)
class Segment:
    """A stretch of a bar, drawn in ``colour``, or with ``letter`` where there are no colours."""

    name: str
    size_bytes: int
    colour: str
    letter: str


@dataclass(frozen=True)
class Bar:
    """A row of the picture."""

    label: str
    segments: Sequence[Segment]

    @property
    def total_bytes(self) -> int:
        return sum(segment.size_bytes for segment in self.segments)


def bars_of(report: PreflightReport) -> list[Bar]:
    """A bar for each phase; that of the peak is divided by what the bytes are. The last adds the overheads."""
    prediction = report.prediction
    parts = [
        Segment(KIND_NAMES[kind], prediction.breakdown[kind], COLOURS[kind], LETTERS[kind])
        for kind in KINDS
        if prediction.breakdown[kind]
    ]
    bars = []
    for phase in PHASES:
        whole = Segment(phase, prediction.phases[phase], PHASE_COLOUR, _PHASE_LETTER)
        bars.append(Bar(phase, parts if phase == prediction.phase else [whole]))
    overhead = max(0, report.needed_bytes - prediction.peak_bytes)
    rest = Segment(OVERHEAD_NAME, overhead, OVERHEAD_COLOUR, _OVERHEAD_LETTER)
    return [*bars, Bar("needed", [*parts, rest])]


def terminal_chart(report: PreflightReport, *, width: int = 80, unicode: bool = True, colour: bool = False) -> str:
    """The bars as text of at most ``width`` columns, with a mark at the device's memory and a legend.

    ``colour`` with ``unicode`` draws solid blocks, anything less draws letters.
    """
    from rich.console import Console
    from rich.text import Text

    bars = bars_of(report)
    blocks = unicode and colour
    mark = "│" if unicode else "|"
    available = report.device.available_bytes if report.device else None
    most = max([*(bar.total_bytes for bar in bars), available or 0, 1])
    columns = max(10, width - 24)
    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system="truecolor" if colour else None, force_terminal=colour)
    for bar in bars:
        line = Text(f"  {bar.label:<10}")
        line.append_text(_bar_text(bar, most, columns, None if available is None else (available, mark), blocks=blocks))
        line.append(f" {size(bar.total_bytes):>11}")
        console.print(line, soft_wrap=True)
    device = f"{mark} {report.device.name}" if report.device else ""
    console.print(_legend(bars[-1], device, blocks=blocks), soft_wrap=True)
    return stream.getvalue().rstrip("\n")


def _bar_text(bar: Bar, most: int, columns: int, capacity: tuple[int, str] | None, *, blocks: bool) -> Text:
    from rich.text import Text

    cells: list[tuple[str, str]] = []
    reached = 0
    for segment in bar.segments:
        reached += segment.size_bytes
        upto = round(reached / most * columns)
        cells += [("█" if blocks else segment.letter, segment.colour)] * (upto - len(cells))
    cells += [(" ", "")] * (columns - len(cells))
    if capacity is not None:
        available, mark = capacity
        cells[min(columns - 1, round(available / most * columns))] = (mark, "bold")
    text = Text()
    for sign, style in cells:
        text.append(sign, style=style)
    return text


def _legend(bar: Bar, device: str, *, blocks: bool) -> Text:
    from rich.text import Text

    text = Text("  ")
    for segment in bar.segments:
        text.append("█" if blocks else segment.letter, style=segment.colour)
        text.append(f" {segment.name}  ")
    text.append(device)
    return text


def check_plot_path(path: Path) -> None:
    """Refuses a picture that cannot be made, before anything is computed.

    Raises UsageError for another format than PNG and SVG, for a folder that is not there, and when matplotlib is not
    installed.
    """
    from importlib.util import find_spec

    if path.suffix.lower() not in FORMATS:
        raise UsageError(problem=f"--plot takes a file that ends in .png or .svg, not {path}")
    if not path.absolute().parent.is_dir():
        raise UsageError(problem=f"--plot takes a file in a directory that exists, not {path}")
    if find_spec("matplotlib") is None:
        raise UsageError(problem="--plot needs matplotlib: pip install 'trainwarden[plot]'")


def plot(report: PreflightReport, path: Path) -> None:
    """Writes the picture as PNG or SVG, by the suffix of ``path``.

    Raises as `check_plot_path`, and when the file cannot be written.
    """
    check_plot_path(path)
    figure = _figure(report)
    try:
        figure.savefig(path, dpi=160, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise UsageError(problem=f"--plot: {path} cannot be written: {error.strerror or error}") from error


def _figure(report: PreflightReport) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.4))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    bars = list(reversed(bars_of(report)))
    for row, bar in enumerate(bars):
        _draw_bar(axes, row, bar, faint=bar.label not in ("needed", report.prediction.phase))
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
    longest = max(bar.total_bytes for bar in bars)
    if report.device is not None:
        _draw_capacity(axes, report, len(bars))
        longest = max(longest, report.device.available_bytes)
    axes.set_xlim(0, longest / GIB * 1.14)
    axes.set_xlabel("GiB")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.suptitle(headline(report), x=0.01, y=1.06, ha="left", fontsize=12, fontweight="bold")
    figure.text(0.01, 0.97, subline(report), ha="left", fontsize=9, color="#555555")
    handles, names = axes.get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    figure.legend(
        unique.values(),
        unique.keys(),
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=len(unique),
        columnspacing=1.2,
        frameon=False,
        fontsize=9,
    )
    return figure


def _draw_bar(axes: Any, row: int, bar: Bar, *, faint: bool) -> None:
    left = 0.0
    for segment in bar.segments:
        length = segment.size_bytes / GIB
        label = None if faint else segment.name
        hatch = "////" if segment.name == OVERHEAD_NAME else None
        axes.barh(
            row, length, left=left, height=0.62, color=segment.colour, label=label, hatch=hatch, edgecolor="white"
        )
        left += length
    axes.text(left, row, f"  {left:.2f}", va="center", fontsize=9, color="#333333")


def _draw_capacity(axes: Any, report: PreflightReport, rows: int) -> None:
    assert report.device is not None
    at = report.device.available_bytes / GIB
    axes.axvline(at, color="#222222", linewidth=1.4, linestyle="--")
    label = f"{report.device.name}: {at:.2f} GiB "
    axes.text(at, rows - 0.45, label, ha="right", va="bottom", fontsize=9, color="#222222")


def headline(report: PreflightReport) -> str:
    """Whether it fits, in one line."""
    margin = report.margin_bytes
    if margin is None:
        return f"{report.subject.name} needs {size(report.needed_bytes)}"
    if margin >= 0:
        return f"{report.subject.name} fits, with {size(margin)} to spare"
    return f"{report.subject.name} does not fit: {size(-margin)} are missing"


def _parameters(report: PreflightReport) -> str:
    if report.subject.architecture is None:
        return ""
    count = report.subject.architecture.parameters
    return f"{count / 1e9:.2f} billion parameters" if count >= 1e8 else f"{count / 1e6:.1f} million parameters"


def subline(report: PreflightReport) -> str:
    """What was asked, in one line."""
    plan = report.subject.plan
    facts = [
        _parameters(report),
        plan.mode,
        f"{plan.micro_batch_size} × {plan.sequence_length} tokens",
        f"accumulated {plan.grad_accum_steps} times" if plan.grad_accum_steps > 1 else "",
        f"{plan.weights} weights",
        "" if plan.autocast in (None, plan.weights) else f"{plan.autocast} autocast",
        plan.optimizer,
        "checkpointing" if plan.checkpointing else "",
        "chunked loss" if plan.loss_chunk_tokens else "",
        "CPU offload" if plan.offload else "",
    ]
    return ", ".join(fact for fact in facts if fact)
