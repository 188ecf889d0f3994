"""A continual merge of a 7B-class rank-16 adapter set, next to copying the bytes that it must touch.

The set is that of a Llama-2-7B with LoRA on all linear layers: 32 layers of seven, 40 M values, generated. Merging and
checking reads the accumulator and the new adapter once and writes the new accumulator once; what is required is half of
the bandwidth of a copy. Both run on one thread, in turn, and are measured in its CPU time, so that waiting for a shared
machine counts for neither. The allocator has its defaults. A new state goes into the block of memory that an earlier
one has left, as in every chain of merges from the third on, and is compared with a copy into memory that is in use; the
first merge of a process goes into memory that the system has to clear first, and is compared with both: with that copy,
and with one into new memory of the same kind, which is the bound for it. QR and the durable commit, which no bandwidth
of memory bounds, are told apart.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchkit import environment, markdown_table, parser, prepare_process, write_json
from torch import Tensor

from trainwarden import slao
from trainwarden.slao import arena

LAYERS, HIDDEN, INTERMEDIATE, RANK = 32, 4096, 11008, 16
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INTERMEDIATE),
    "mlp.up_proj": (HIDDEN, INTERMEDIATE),
    "mlp.down_proj": (INTERMEDIATE, HIDDEN),
}
LEAST_SHARE = 0.5
"""Of the bandwidth of a copy: the requirement."""

CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK}


def adapter(seed: int, dtype: torch.dtype, layers: int = LAYERS) -> dict[str, Tensor]:
    """The tensors that a task has trained, as peft saves them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for name, (width_in, width_out) in LINEARS.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, width_in, generator=generator).to(dtype)
            tensors[f"{key}.lora_B.weight"] = torch.randn(width_out, RANK, generator=generator).to(dtype)
    return tensors


def touched_bytes(accumulator: dict[str, Tensor], new: dict[str, Tensor]) -> int:
    """Each input read once, the result written once."""
    return 2 * sum(t.nbytes for t in accumulator.values()) + sum(t.nbytes for t in new.values())


def seconds(action: Callable[[], object]) -> float:
    """CPU time of one call on this thread, its result dropped outside."""
    began_s = time.thread_time()
    result = action()
    took_s = time.thread_time() - began_s
    del result
    return took_s


def wall_seconds(action: Callable[[], object]) -> float:
    """Wall time of one call: for what waits for a disk."""
    began_s = time.perf_counter()
    action()
    return time.perf_counter() - began_s


def measure(seed: int, rounds: int, layers: int = LAYERS) -> dict[str, Any]:
    """Copies and merges in turn, so that a busy machine slows all alike; the first round warms up and is not told."""
    start = slao.begin(adapter(seed, torch.float32, layers)).tensors
    accumulator = slao.merge(start, adapter(seed + 1, torch.float32, layers), 2).tensors
    news = {_name(dtype): adapter(seed + 2, dtype, layers) for dtype in (torch.float32, torch.bfloat16)}
    source = torch.randn(sum(t.numel() for t in accumulator.values()))
    target = source.clone()
    actions: dict[str, Callable[[], object]] = {
        "old": lambda: target.copy_(source),
        "new": lambda: arena.room_for({"all": source})["all"].copy_(source),  # on the large pages of a merged state
    }
    for name, new in news.items():
        actions[f"{name} old"] = lambda new=new: slao.merge(accumulator, new, 3)  # type: ignore[misc]
        actions[f"{name} new"] = actions[f"{name} old"]
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds + 1):
        for name, action in actions.items():
            if name.endswith("new"):
                arena.forget()
            took_s = seconds(action)
            if turn:
                times[name].append(took_s)
    rows = [
        _row(name, memory, times, touched_bytes(accumulator, new), source.nbytes)
        for memory in ("old", "new")
        for name, new in news.items()
    ]
    return {"values": source.numel(), "rows": rows}


def _row(name: str, memory: str, times: dict[str, list[float]], need_bytes: int, copied_bytes: int) -> dict[str, Any]:
    merges_s = times[f"{name} {memory}"]
    row: dict[str, Any] = {
        "adapter": name,
        "memory": memory,
        "touched_bytes": need_bytes,
        "merge_ms": round(statistics.median(merges_s) * 1e3, 1),
        "copied_bytes": 2 * copied_bytes,
    }
    for kind in ("old", "new"):
        shares = [
            (need_bytes / merge_s) / (2 * copied_bytes / copy_s)  # a copy reads and writes each of its bytes
            for merge_s, copy_s in zip(merges_s, times[kind], strict=True)
        ]
        row[f"copy_into_{kind}_ms"] = round(statistics.median(times[kind]) * 1e3, 1)
        row[f"share_of_{kind}"] = round(statistics.median(shares), 3)
        row[f"share_of_{kind}_range"] = [round(min(shares), 3), round(max(shares), 3)]
    return row


def holds(row: dict[str, Any]) -> bool:
    """Whether a merge has half of the bandwidth of a copy into the same kind of memory."""
    return bool(row[f"share_of_{row['memory']}"] >= LEAST_SHARE)


def apart(seed: int, folder: Path, layers: int = LAYERS) -> dict[str, float]:
    """What memory bandwidth does not bound: QR, hashing, and the durable commit with its verification."""
    store = slao.SlaoStore(folder)
    first, second = (slao.Adapter(adapter(seed + i, torch.float32, layers), CONFIG, f"task-{i}") for i in (0, 1))
    slao.merge_trained(store, first)
    start = slao.Start(2, first.digest())
    proposals: list[slao.Proposal] = []
    found = {
        "orthogonal start (QR)": wall_seconds(lambda: slao.init_adapter(first.tensors)),
        "overlap of two adapters (QR of both)": wall_seconds(lambda: slao.overlap(first.tensors, second.tensors)),
        "propose: read, verify, merge, check, hash": wall_seconds(
            lambda: proposals.append(slao.propose(store, second, start=start))
        ),
        "commit: write, sync, read back, export": wall_seconds(lambda: store.commit(proposals[0])),
    }
    return {name: round(took_s, 3) for name, took_s in found.items()}


def table(result: dict[str, Any]) -> str:
    """Both tables."""
    columns = ("adapter", "into", "bytes touched", "merge and check", "bandwidth")
    columns += ("copy into old memory", "share", "copy into new memory", "share")

    def cells(row: dict[str, Any]) -> tuple[str, ...]:
        compared: list[str] = []
        for kind in ("old", "new"):
            low, high = row[f"share_of_{kind}_range"]
            speed = row["copied_bytes"] / row[f"copy_into_{kind}_ms"] / 1e6
            compared += [f"{speed:.1f} GB/s", f"{row[f'share_of_{kind}']:.0%} ({low:.0%} … {high:.0%})"]
        return (
            row["adapter"],
            f"{row['memory']} memory",
            f"{row['touched_bytes'] / 1e6:.0f} MB",
            f"{row['merge_ms']:.1f} ms",
            f"{row['touched_bytes'] / row['merge_ms'] / 1e6:.1f} GB/s",
            *compared,
        )

    others = [(name, f"{took_s:.2f} s") for name, took_s in result["apart_s"].items()]
    merges = markdown_table(columns, [cells(row) for row in result["rows"]])
    return f"{merges}\n\n{markdown_table(('told apart', 'time'), others)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument("--rounds", type=int, default=15, help="measured rounds (default 15)")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepare_process(folder)
        result = measure(chosen.seed, chosen.rounds)
        result["apart_s"] = apart(chosen.seed, Path(folder) / "merged")
    print(table(result))
    command = f"python benchmarks/slao_merge.py --seed {chosen.seed} --rounds {chosen.rounds}"
    facts = environment(command, "cpu", ["trainwarden", "torch"])
    write_json(chosen.output / "slao_merge.json", {"environment": facts, **result})
    (chosen.output / "slao_merge.md").write_text(table(result) + "\n", encoding="utf-8")
    return 0 if all(holds(row) for row in result["rows"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
