"""What the benchmarks share: facts about the machine, tables, and result files without machine paths or host names."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def prepare_process(warden_home: str) -> None:
    """One torch thread, no network, and a ledger of its own, so that nothing of the user's is read or written."""
    os.environ.update(WARDEN_HOME=warden_home, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    torch.set_num_threads(1)


def observed_trainer(
    compute_loss: Callable[[Any], torch.Tensor], watch: Callable[[torch.optim.Optimizer], None]
) -> Any:
    """A transformers ``Trainer`` class with this loss; ``watch`` is told of every optimizer that it makes."""
    from transformers import Trainer

    class ObservedTrainer(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: torch.nn.Module, inputs: Any, *_: Any, **__: Any) -> torch.Tensor:  # noqa: ARG002
            return compute_loss(inputs)

        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            fresh = self.optimizer is None
            optimizer = super().create_optimizer(*args, **kwargs)
            if fresh:
                watch(optimizer)
            return optimizer

    return ObservedTrainer


def parser(description: str) -> argparse.ArgumentParser:
    """A command line with the options that every benchmark has."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    made.add_argument("--output", type=Path, default=RESULTS, help="directory for the result files")
    made.add_argument("--seed", type=int, default=0, help="seed of weights and data (default 0)")
    return made


def environment(command: str, device: str, packages: Iterable[str]) -> dict[str, Any]:
    """Date, command, hardware and versions, as they head each result file."""
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "device": _processor() if device == "cpu" else torch.cuda.get_device_name(),
        "logical_cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages if installed(name)},
    }


def installed(package: str) -> bool:
    """Whether a distribution of that name is there."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a result file; its directory is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A pipe table with aligned columns, readable in a terminal as well as on a page."""
    cells = [list(columns), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"CPU ({line.partition(':')[2].strip()})"
    return f"CPU ({platform.processor() or platform.machine()})"
