"""How fast gradients are checked for NaN and infinity, next to other ways and to a whole training step.

100 million values in 124 tensors of different sizes, as a transformer has them, on one thread. The check is the one
that runs before every ``optimizer.step()`` on the host; on a GPU (``--device cuda``) the one that stays on the device
is measured too. The physical limit is a plain reduction (``sum``) over one flat buffer of as many values; the usual way
is ``isfinite().all()`` of each tensor. All take turns, so that a busy machine slows them alike, and each round gives
one ratio; the figure is the median over rounds, in CPU time of the thread (on a GPU: in time on the device).

The second table is a whole training step of a small transformer, with and without each way to watch its numbers. For
the guard's check, its time is measured by itself inside the step and divided by the step's; ``detect_anomaly`` and the
usual way are timed as whole steps, in turns with plain ones.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from benchkit import environment, markdown_table, parser, prepare_process, write_json
from torch import Tensor, nn

from trainwarden.runtime.finite_check import largest_magnitudes, looks_finite

LEAST_BANDWIDTH = 0.7
"""Of that of the flat reduction: the requirement."""
LEAST_SPEEDUP = 10.0
"""Over ``isfinite().all()`` tensor by tensor: the requirement."""
MOST_OF_A_STEP = 0.01
"""Of a whole training step: the requirement."""

VALUES = 100_000_000
FLAT, OURS, LOOP = "one flat buffer: sum", "trainwarden", "isfinite().all() of each tensor"
DEVICE = "trainwarden, on the device"

Action = Callable[[], object]


def gradients(values: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """About so many values in the shapes of a transformer of 12 blocks: an embedding, matrices, and small vectors."""
    width = max(8, int((values / 177) ** 0.5) // 8 * 8)
    block = [(3 * width, width), (3 * width,), (width, width), (width,), (4 * width, width), (4 * width,)]
    block += [(width, 4 * width), (width,), (width,), (width,)]
    shapes = [(33 * width, width), (width,), (width,), (width,), *(shape for _ in range(12) for shape in block)]
    generator = torch.Generator().manual_seed(0)
    small = [torch.randn(shape, generator=generator) for shape in shapes]
    return [tensor.to(device, dtype) for tensor in small]


def contestants(tensors: Sequence[Tensor]) -> dict[str, Action]:
    """What is compared, by name; each ends with one value on the host, but for the check that stays on the device."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    loss = torch.tensor(1.0, device=flat.device)
    found: dict[str, Action] = {
        FLAT: lambda: bool(flat.sum().isfinite()),
        OURS: lambda: looks_finite(tensors, [loss]),
        LOOP: lambda: all(bool(torch.isfinite(tensor).all()) for tensor in tensors),
    }
    if flat.is_cuda:
        found[DEVICE] = lambda: ~largest_magnitudes(tensors, flat.device).isfinite().all()
    return found


def seconds(action: Action, device: str) -> float:
    """CPU time of one call on this thread, or time on the device."""
    if device == "cpu":
        began_s = time.thread_time()
        action()
        return time.thread_time() - began_s
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    action()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3


def in_turns(actions: Mapping[str, Action], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each action in each round; a first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds + 1):
        for name, action in actions.items():
            took_s = seconds(action, device)
            if turn:
                times[name].append(took_s)
    return times


def measure_checks(values: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """One row for each type and contestant."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        tensors = gradients(values, dtype, device)
        size_bytes = sum(tensor.nbytes for tensor in tensors)
        times = in_turns(contestants(tensors), rounds, device)
        for name, took_s in times.items():
            ratios = [flat / own for flat, own in zip(times[FLAT], took_s, strict=True)]
            speedups = [loop / own for loop, own in zip(times[LOOP], took_s, strict=True)]
            rows.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "check": name,
                    "tensors": len(tensors),
                    "values": sum(tensor.numel() for tensor in tensors),
                    "ms": round(statistics.median(took_s) * 1e3, 2),
                    "gb_per_s": round(size_bytes / statistics.median(took_s) / 1e9, 1),
                    "of_flat": round(statistics.median(ratios), 3),
                    "speedup": round(statistics.median(speedups), 2),
                }
            )
    return rows


# -- a whole step --------------------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """A causal language model; returns the next-token cross entropy of ``tokens``, ``[rows, length]``."""

    def __init__(self, width: int, layers: int, vocabulary: int = 2048) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True) for _ in range(layers)
        )
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens[:, :-1])
        mask = nn.Transformer.generate_square_subsequent_mask(hidden.shape[1], device=tokens.device)
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), tokens[:, 1:].flatten())


class Steps:
    """A model, its optimizer and one batch; each method is one training step."""

    def __init__(self, device: str, width: int, layers: int, rows: int, length: int) -> None:
        torch.manual_seed(0)
        self.model = Transformer(width, layers).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.tokens = torch.randint(2048, (rows, length), device=device)
        self.check_s: list[float] = []
        self._device = device

    def _step(self, check: Callable[[Tensor, list[Tensor]], object] | None = None) -> None:
        loss = self.model(self.tokens)
        loss.backward()
        if check is not None:
            check(loss.detach(), [p.grad for p in self.model.parameters() if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad()

    def plain(self) -> None:
        self._step()

    def guarded(self) -> None:
        """With the check, whose own time is kept."""

        def check(loss: Tensor, found: list[Tensor]) -> None:
            if self._device == "cpu":
                self.check_s.append(seconds(lambda: looks_finite(found, [loss]), "cpu"))
            else:
                self.check_s.append(seconds(lambda: largest_magnitudes(found, loss.device), self._device))

        self._step(check)

    def usual(self) -> None:
        self._step(lambda _loss, found: all(bool(torch.isfinite(gradient).all()) for gradient in found))

    def anomaly(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that it is slow
            with torch.autograd.detect_anomaly(check_nan=True):
                self._step()


def measure_steps(rounds: int, device: str, **shape: int) -> list[dict[str, Any]]:
    """What each way adds to a step, as a share of the plain one."""
    steps = Steps(device, **shape)
    ways: dict[str, Action] = {
        "nothing": steps.plain,
        OURS: steps.guarded,
        LOOP: steps.usual,
        "torch.autograd.detect_anomaly": steps.anomaly,
    }
    times = in_turns(ways, rounds, device)
    plain = times["nothing"]
    rows = []
    for name, took_s in times.items():
        if name == OURS:
            shares = [check / own for check, own in zip(steps.check_s[1:], plain, strict=True)]
        else:
            shares = [own / base - 1 for own, base in zip(took_s, plain, strict=True)]
        rows.append(
            {
                "way": name,
                "parameters": sum(p.numel() for p in steps.model.parameters()),
                "step_ms": round(statistics.median(took_s) * 1e3, 1),
                "added": round(statistics.median(shares), 5),
            }
        )
    return rows


def table(result: Mapping[str, Any]) -> str:
    """Both tables."""
    columns = ("type", "check", "time", "bandwidth", "of the flat reduction", "against each tensor")
    rows = [
        (
            row["dtype"],
            row["check"],
            f"{row['ms']:.2f} ms",
            f"{row['gb_per_s']:.1f} GB/s",
            f"{row['of_flat']:.0%}",
            f"{row['speedup']:.1f}×",
        )
        for row in result["checks"]
    ]
    steps = [(row["way"], f"{row['step_ms']:.1f} ms", f"{row['added']:+.2%}") for row in result["steps"]]
    steps_table = markdown_table(("what watches the numbers of a step", "step", "added"), steps)
    return f"{markdown_table(columns, rows)}\n\n{steps_table}"


def verdict(result: Mapping[str, Any]) -> bool:
    """Whether the requirements hold; those of the check in float32, as they are stated."""
    (ours,) = [row for row in result["checks"] if (row["check"], row["dtype"]) == (OURS, "float32")]
    (step,) = [row for row in result["steps"] if row["way"] == OURS]
    quick = ours["of_flat"] >= LEAST_BANDWIDTH and ours["speedup"] >= LEAST_SPEEDUP
    return bool(quick and step["added"] < MOST_OF_A_STEP)


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument("--rounds", type=int, default=15, help="measured rounds (default 15)")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepare_process(folder)
        result: dict[str, Any] = {"checks": measure_checks(VALUES, chosen.rounds, chosen.device)}
        result["steps"] = measure_steps(chosen.rounds, chosen.device, width=256, layers=4, rows=8, length=129)
    print(table(result))
    command = f"python benchmarks/finite_check.py --rounds {chosen.rounds} --device {chosen.device}"
    facts = environment(command, chosen.device, ["trainwarden", "torch"])
    write_json(chosen.output / "finite_check.json", {"environment": facts, **result})
    (chosen.output / "finite_check.md").write_text(table(result) + "\n", encoding="utf-8")
    return 0 if verdict(result) else 1


if __name__ == "__main__":
    raise SystemExit(main())
