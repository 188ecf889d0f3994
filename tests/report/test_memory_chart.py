"""The picture of a prediction: readable without colours, true to the numbers, and a file that can be looked at."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from trainwarden.errors import UsageError
from trainwarden.memory.overheads import DeviceMemory, Overheads
from trainwarden.memory.plan import TrainingPlan
from trainwarden.memory.prediction import KINDS
from trainwarden.report import memory_chart
from trainwarden.report.memory import ceilings_one_text, ceilings_text, preflight_text
from trainwarden.train.preflight import PreflightReport, preflight
from trainwarden.train.subject import Subject, complete, subject_of

GIB = 2**30
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def report(gib: float | None = 24.0, **changes: Any) -> PreflightReport:
    subject: Subject = subject_of("llama-8b", complete("x", LLAMA_8B), TrainingPlan(autocast="bfloat16"))
    device = None if gib is None else DeviceMemory(name="RTX 4090", total_bytes=round(gib * GIB))
    return preflight(subject.having(**changes), device=device, overheads=Overheads(), traced=False)


def rows_of(chart: str) -> dict[str, str]:
    return {line.split()[0]: line for line in chart.splitlines()[:-1]}


def test_the_bars_are_as_long_as_their_numbers() -> None:
    found = report(checkpointing=True)
    rows = rows_of(memory_chart.terminal_chart(found, width=100, unicode=False))
    assert list(rows) == ["load", "forward", "backward", "optimizer", "needed"]
    most = max(found.needed_bytes, 24 * GIB)
    for phase, size in found.prediction.phases.items():
        length = len(re.findall(r"[=A-Z]", rows[phase][12:88]))
        assert length == pytest.approx(size / most * 76, abs=1.5)
        assert rows[phase].endswith(f" {size / GIB:.2f} GiB")


def test_the_peak_is_divided_by_what_it_is_and_the_legend_names_each() -> None:
    found = report(checkpointing=True)
    chart = memory_chart.terminal_chart(found, width=100)
    legend = chart.splitlines()[-1]
    for kind in KINDS:
        shown = f"{memory_chart.LETTERS[kind]} {memory_chart.KIND_NAMES[kind]}" in legend
        assert shown == (found.prediction.breakdown[kind] > 0)
    assert rows_of(chart)["backward"].count("W") > rows_of(chart)["backward"].count("L") > 0


def test_the_mark_stands_where_the_memory_ends() -> None:
    fits = rows_of(memory_chart.terminal_chart(report(checkpointing=True), width=100))
    assert all(re.search(r"│ +\d", row) for row in fits.values()), "everything ends before it"
    too_small = rows_of(memory_chart.terminal_chart(report(10.0), width=100))
    assert all(re.search(r"│[=A-Z.]", row) for row in too_small.values())


def test_without_a_device_there_is_no_mark() -> None:
    assert "│" not in memory_chart.terminal_chart(report(None))


def test_a_terminal_with_colours_gets_blocks_and_one_without_gets_letters() -> None:
    coloured = memory_chart.terminal_chart(report(), colour=True)
    assert "\x1b[" in coloured
    assert "█" in coloured
    plain = memory_chart.terminal_chart(report(), unicode=False)
    assert plain.isascii()


@pytest.mark.parametrize("width", [40, 80, 100])
def test_no_line_of_bars_is_wider_than_the_terminal(width: int) -> None:
    assert max(len(line) for line in memory_chart.terminal_chart(report(), width=width).splitlines()[:-1]) <= width


@pytest.mark.parametrize("gib", [24.0, 8.0, None])
def test_a_png_is_written(tmp_path: Path, gib: float | None) -> None:
    file = tmp_path / "memory.png"
    memory_chart.plot(report(gib), file)
    assert file.read_bytes().startswith(b"\x89PNG")
    assert file.stat().st_size > 10_000


def test_an_svg_is_well_formed_and_the_same_each_time(tmp_path: Path) -> None:
    file = tmp_path / "memory.svg"
    memory_chart.plot(report(), file)
    assert ElementTree.parse(file).getroot().tag.endswith("svg")
    assert "<dc:date>" not in file.read_text()


@pytest.mark.parametrize(
    ("name", "said"),
    [("memory.jpg", r"\.png or \.svg"), ("memory", r"\.png or \.svg"), ("nowhere/memory.png", "directory that exists")],
)
def test_a_picture_that_cannot_be_made_is_refused_before_anything_is_computed(
    tmp_path: Path, name: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        memory_chart.check_plot_path(tmp_path / name)


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "memory.png").mkdir()
    with pytest.raises(UsageError, match="cannot be written"):
        memory_chart.plot(report(), tmp_path / "memory.png")


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install"):
        memory_chart.check_plot_path(tmp_path / "memory.png")


# -- the words around it ----------------------------------------------------------------------------------------------


def test_the_text_answers_the_questions_in_their_order() -> None:
    found = report(micro_batch_size=4)
    text = preflight_text(found, "CHART", [])
    parts = ["does not fit", "CHART", "how known", "micro-batch", "sequence", "what would make it fit", "findings"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert "gradient checkpointing" in text
    assert "closed form, ±5%" in text


def test_without_a_device_it_names_the_cards_that_would_do() -> None:
    text = preflight_text(report(None), "", ["RTX 5090", "H100"])
    assert "fits on" in text
    assert "RTX 5090, H100" in text
    assert "micro-batch" not in text


def test_memory_that_others_hold_is_said() -> None:
    found = report(checkpointing=True)
    device = DeviceMemory(name="RTX 4090", total_bytes=24 * GIB, others_bytes=2 * GIB)
    subject = found.subject
    taken = preflight(subject, device=device, overheads=Overheads(), traced=False)
    assert "2.00 GiB of it held by other processes" in preflight_text(taken, "", [])


def test_the_ceilings_stand_in_a_table_with_what_they_assume() -> None:
    text = ceilings_text({"H100": [4.4, 9.7, 12.0, 19.0, 38.0, 37.0, 128.0]}, {"H100": 80 * GIB}, "assumed")
    assert re.search(r"H100 +80\.00 GiB +4\.4 +9\.7 +12 +19 +38 +37 +128", text)
    assert "2,048 tokens" in text
    one = ceilings_one_text("T4", 15 * GIB, [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], "assumed")
    assert re.search(r"full fp32 +– ", one)
