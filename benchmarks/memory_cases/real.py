"""Real peaks: torch's CPU allocator, counted to the byte in a process of its own (memory_prediction.c, preloaded)."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memory_cases.cases import Case, batch_of, build, loop_of
from trainwarden.memory.trace_loop import run_steps

BENCHMARKS = Path(__file__).parents[1]


def build_counter(directory: Path) -> Path:
    """Compiles the allocator's counter."""
    library = directory / "counter.so"
    source = BENCHMARKS / "memory_prediction.c"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def measure(cases: Sequence[Case], seed: int) -> list[int]:
    """The allocator's peak in bytes of each case, run for two steps in a process of its own."""
    with tempfile.TemporaryDirectory() as directory:
        environment = os.environ | {"LD_PRELOAD": str(build_counter(Path(directory))), "OMP_NUM_THREADS": "1"}
        request = json.dumps([asdict(case) for case in cases])
        command = [
            sys.executable,
            "-W",
            "ignore",
            str(BENCHMARKS / "memory_prediction.py"),
            "--seed",
            str(seed),
            "--measure",
        ]
        done = subprocess.run(command, input=request, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    peaks: list[int] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def real_peak(case: Case) -> int:
    """Bytes at the worst moment of two real steps; to be called where the counter is preloaded."""
    counter = ctypes.CDLL(None)
    counter.counter_live.restype = counter.counter_peak.restype = ctypes.c_size_t
    gc.collect()
    before = counter.counter_live()
    batch = batch_of(case)
    model = materialised(case, batch)
    loop = loop_of(case, real=True)
    gc.collect()
    counter.counter_reset_peak()
    run_steps(model, batch, loop, autocast=torch.autocast("cpu", loop.autocast) if loop.autocast else nullcontext())
    return int(counter.counter_peak() - before)


def materialised(case: Case, batch: Any) -> nn.Module:
    """The model with real tensors. Packed ones cannot be made from values: what they hold does not matter here."""
    if case.mode == "qlora" and not case.bitsandbytes:
        with torch.device("meta"):
            model = build(case)
        model = model.to_empty(device="cpu")
        model.get_base_model().tie_weights()  # it unties them
        return model
    model = build(case, real=True)
    if case.family == "conv":
        with torch.no_grad():
            model(batch)  # a lazy layer takes its shape from its first input
    return model


def worker(seed: int) -> int:
    """Reads cases from standard input, and prints their peaks."""
    warnings.simplefilter("ignore")
    peaks = []
    for entry in json.loads(sys.stdin.read()):
        torch.manual_seed(seed)
        peaks.append(real_peak(Case(**entry)))
    print(json.dumps(peaks))
    return 0
