"""How much of its first task a campaign over three data sets keeps, beside sequential LoRA and other merges.

The base is the quickstart model, trained in full as `configs/quickstart.yaml` says. The data sets are three kinds of
text that every Python installation brings: the language reference, the source of the standard library, and the names of
characters. A campaign (`Campaign`, what `warden slao run` runs) trains on one after the other; since a task starts from
the last adapter as it was trained, not from the merged one, the same three adapters are then merged in the other modes
too. Sequential LoRA goes on training one adapter. All see the same rows in the same order, with the same settings. What
is told is the loss (nats a token) on rows that were held out of each data set.
"""

from __future__ import annotations

import json
import random
import statistics
import sysconfig
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchkit import environment, markdown_table, parser, prepare_process, write_json

from trainwarden import slao
from trainwarden.slao.campaign import Campaign
from trainwarden.slao.campaign_config import CampaignConfig, CampaignTask, load_campaign
from trainwarden.slao.campaign_evaluation import held_out_losses
from trainwarden.train.config import load_config
from trainwarden.train.run import run_from_config, trainer_from_config

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
ROWS, CHARACTERS = 640, 320
"""Of each data set, and of a row: about the 128 tokens that the model takes."""
HELD_OUT = 64
SETTINGS: Mapping[str, Any] = {"max_steps": 150, "learning_rate": 5e-3, "batch_size": 16, "warmup_steps": 10}
RANK = 16

BASE, SEQUENTIAL = "base model, no adapter", "sequential LoRA"
MERGES: Mapping[str, slao.MergePolicy] = {
    "SLAO, λ = 1/√i": slao.MergePolicy("slao", "inverse_sqrt"),
    "SLAO, λ = 1/i": slao.MergePolicy("slao", "inverse"),
    "average, λ = 1/i": slao.MergePolicy("average", "inverse"),
    "TIES, λ = 1/i": slao.MergePolicy("ties", "inverse"),
}
PAPER = next(iter(MERGES))
"""The contestant that is required to keep more of task 1 than `SEQUENTIAL`."""

Losses = dict[str, float]


def reference() -> Iterator[str]:
    """The language reference in prose, as `help()` shows it."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield from _cut(topics[name])


def source() -> Iterator[str]:
    """Python source of the standard library."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield from _cut(path.read_text(encoding="utf-8", errors="replace"))


def names() -> Iterator[str]:
    """What characters are called."""
    lines = (f"U+{n:04X} {unicodedata.name(chr(n))}" for n in range(0x20, 0x3000) if unicodedata.name(chr(n), ""))
    yield from _cut("\n".join(lines))


TASKS = {"reference": reference, "source": source, "names": names}


def _cut(text: str) -> Iterator[str]:
    for start in range(0, len(text) - CHARACTERS // 2, CHARACTERS):
        yield text[start : start + CHARACTERS]


def write_data(folder: Path, rows: int = ROWS) -> None:
    """A JSONL file of each data set: rows drawn once, the same in every run."""
    for name, texts in TASKS.items():
        drawn = random.Random(name).sample(list(texts()), rows)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in drawn), encoding="utf-8")


def train_base(folder: Path, seed: int, *overrides: str) -> Path:
    """The quickstart model; its directory."""
    overrides = (f"output_dir={folder / 'base'}", f"trainer.seed={seed}", *overrides)
    return Path(run_from_config(load_config(QUICKSTART, overrides, {}).config, observers=()).model_path)


def campaign_config(folder: Path, base: Path, seed: int, **settings: Any) -> CampaignConfig:
    """The campaign of one seed, which decides the adapters' start, the order of rows, and which are held out."""
    trainer = {**SETTINGS, **settings, "seed": seed, "device": "cpu", "schedule": "cosine"}
    lines = [
        f"output_dir: {folder / f'seed-{seed}'}",
        f"model: {{name_or_path: {base}, lora_rank: {RANK}, lora_alpha: {2 * RANK}}}",
        f"data: {{eval_rows: {HELD_OUT}, max_length: 128}}",
        f"trainer: {{{', '.join(f'{key}: {value}' for key, value in trainer.items())}}}",
        "tasks:",
        *(f"  {name}: {{data: {{train: {folder / name}.jsonl}}}}" for name in TASKS),
    ]
    path = folder / f"seed-{seed}.yaml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return load_campaign(path, (), {})


def losses_of(config: CampaignConfig, adapter: Mapping[str, Any]) -> Losses:
    """Of an adapter on all three tasks."""
    return held_out_losses(config.tasks, adapter, lambda _: None)


def merged_stages(config: CampaignConfig) -> dict[str, list[Losses]]:
    """Run the campaign; for each kind of merge, the losses after each task."""
    Campaign(config, observers=()).run()
    adapters = [slao.read_adapter(Path(task.config.output_dir) / "model").tensors for task in config.tasks]
    found = {}
    for name, policy in MERGES.items():
        accumulator = slao.begin(adapters[0]).tensors
        stages = [losses_of(config, accumulator)]
        for index, adapter in enumerate(adapters[1:], start=2):
            accumulator = slao.merge(accumulator, adapter, index, policy).tensors
            stages.append(losses_of(config, accumulator))
        found[name] = stages
    return found


def sequential_stages(config: CampaignConfig) -> list[Losses]:
    """One adapter, trained on the tasks in their order; the first training is the campaign's own."""
    adapter = slao.read_adapter(Path(config.tasks[0].config.output_dir) / "model").tensors
    stages = [losses_of(config, adapter)]
    for task in config.tasks[1:]:
        adapter = _trained_on(task, adapter, config.output_dir / "sequential" / task.name)
        stages.append(losses_of(config, adapter))
    return stages


def _trained_on(task: CampaignTask, adapter: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    def go_on(model: Any) -> None:
        slao.install(model, adapter)

    trainer_from_config(task.config, observers=(), output_dir=str(folder), config=None, on_loaded=go_on).train()
    return slao.read_adapter(folder / "model").tensors


def base_stages(config: CampaignConfig) -> list[Losses]:
    """What there is to forget: the losses without an adapter, which an adapter with B = 0 has."""
    adapter = slao.read_adapter(Path(config.tasks[0].config.output_dir) / "model").tensors
    empty = {key: value * 0 if "lora_B" in key else value for key, value in adapter.items()}
    return [losses_of(config, empty)] * len(config.tasks)


def measure(folder: Path, base: Path, seed: int, **settings: Any) -> dict[str, list[Losses]]:
    """Losses by contestant, after each task, on each task."""
    config = campaign_config(folder, base, seed, **settings)
    merges = merged_stages(config)
    return {BASE: base_stages(config), **merges, SEQUENTIAL: sequential_stages(config)}


def forgotten(stages: Sequence[Losses]) -> float:
    """How far the loss on the first task has risen from its own training to the end."""
    first = next(iter(TASKS))
    return stages[-1][first] - stages[0][first]


def row(name: str, runs: Sequence[Mapping[str, Sequence[Losses]]]) -> list[str]:
    """One line of the table: means over the seeds, and the range of what was forgotten."""
    stages = [run[name] for run in runs]
    first, *_ = TASKS

    def mean(stage: int, task: str) -> str:
        return f"{statistics.fmean(one[stage][task] for one in stages):.3f}"

    cells = [name, mean(0, first), mean(1, first), *(mean(2, task) for task in TASKS)]
    every = statistics.fmean(statistics.fmean(one[-1].values()) for one in stages)
    lost = [forgotten(one) for one in stages]
    told = "–" if name == BASE else f"{statistics.fmean(lost):+.3f} ({min(lost):+.3f} … {max(lost):+.3f})"
    return [*cells, f"{every:.3f}", told]


def table(runs: Sequence[Mapping[str, Sequence[Losses]]]) -> str:
    """All contestants."""
    first, second, third = TASKS
    columns = (
        "contestant",
        f"{first} after 1",
        f"{first} after 2",
        f"{first} after 3",
        f"{second} after 3",
        f"{third} after 3",
        "mean after 3",
        f"{first} forgotten",
    )
    return markdown_table(columns, [row(name, runs) for name in (BASE, SEQUENTIAL, *MERGES)])


def holds(runs: Sequence[Mapping[str, Sequence[Losses]]]) -> bool:
    """Whether SLAO keeps more of task 1 than sequential LoRA does, with every seed."""
    first = next(iter(TASKS))
    return all(run[PAPER][-1][first] < run[SEQUENTIAL][-1][first] for run in runs)


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument("--seeds", type=int, default=3, help="campaigns, each with a seed of its own (default 3)")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_process(str(folder / "home"))
        write_data(folder)
        base = train_base(folder, chosen.seed)
        runs = [measure(folder, base, chosen.seed + number) for number in range(chosen.seeds)]
    print(table(runs))
    command = f"python benchmarks/slao_campaign.py --seed {chosen.seed} --seeds {chosen.seeds}"
    facts = environment(command, "cpu", ["trainwarden", "torch", "transformers", "peft"])
    settings = {**SETTINGS, "lora_rank": RANK, "rows": ROWS, "held_out": HELD_OUT}
    write_json(chosen.output / "slao_campaign.json", {"environment": facts, "settings": settings, "runs": runs})
    (chosen.output / "slao_campaign.md").write_text(table(runs) + "\n", encoding="utf-8")
    return 0 if holds(runs) else 1


if __name__ == "__main__":
    raise SystemExit(main())
