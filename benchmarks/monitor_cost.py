"""What watching the hardware costs: CPU time of sampling eight GPUs at 1 Hz, and of the guards at a step boundary.

The GPUs are scripted: the real binding (nvidia-ml-py, ctypes) calls the stand-in ``libnvidia-ml.so.1`` of the tests,
which reads its script at every call, so that the sampling figures include the stand-in and are upper bounds for our
share; what a real driver adds to each call must be measured on a GPU. Figures:

- ``sampling``: CPU time of the process over a while of sampling at 1 Hz with an idle main thread, less that of the same
  process without a sampler, as a share of one core. The first rounds, which load the library and find the devices, are
  not counted;
- ``round``: CPU time of one reading of all devices, for the usual rounds and those with the slow sensors (each 15 s);
- ``boundary``: wall time of ``Sampler.latest`` and ``HardwareGuard.observe`` on the training thread, when there is a
  new sample and when there is none.

Exits 1 when sampling costs more than the limit.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import benchkit

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.device.stand_in import StandIn, compile_stub, compiler  # noqa: E402 - the tests are no installed package

DEVICES = 8
LIMIT_PERCENT = 0.5

PROGRAM = """
import resource, statistics
from trainwarden.guards.hardware import HardwareGuard

def cpu_s():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime

def spread(values):
    ordered = sorted(values)
    pick = lambda share: ordered[min(int(len(ordered) * share), len(ordered) - 1)]
    figures = {"median": statistics.median(ordered), "p99": pick(0.99), "max": ordered[-1]}
    return {**{name: round(value, 2) for name, value in figures.items()}, "count": len(ordered)}

def share_of_a_core(wall_s):
    began_cpu_s, began_s = cpu_s(), time.monotonic()
    time.sleep(wall_s)
    return (cpu_s() - began_cpu_s) / (time.monotonic() - began_s)

idle = share_of_a_core(SECONDS / 4)
sampler = Sampler(period_s=1.0).start()
until(lambda: sampler.latest().sequence >= 2)
watching = share_of_a_core(SECONDS)
samples = sampler.latest().sequence
assert len(sampler.latest().readings) == DEVICES

latest_us = []
for _ in range(20_000):
    began = time.perf_counter()
    sampler.latest()
    latest_us.append((time.perf_counter() - began) * 1e6)
sampler.close()

devices = list_devices().devices
def rounds(count, slow):
    taken_us = []
    for _ in range(count):
        if slow:
            for device in devices:
                device._health = None
        began = time.thread_time()
        for device in devices:
            device.read()
        taken_us.append((time.thread_time() - began) * 1e6)
    return spread(taken_us)

rounds(5, False)
usual, slow = rounds(400, False), rounds(100, True)

guard = HardwareGuard()
new_us, old_us = [], []
readings = tuple(device.read() for device in devices)
for sequence in range(1, 2001):
    sample = Sample(readings=readings, taken_at_s=float(sequence), sequence=sequence)
    for into in (new_us, old_us):
        began = time.perf_counter()
        assert guard.observe(sample, step=sequence) == []
        into.append((time.perf_counter() - began) * 1e6)

say({"seconds": SECONDS, "samples": samples, "idle": round(idle, 6), "watching": round(watching, 6),
     "round_us": {"usual": usual, "with_slow_sensors": slow},
     "boundary_us": {"latest": spread(latest_us), "observe_new": spread(new_us),
                     "observe_nothing_new": spread(old_us)}})
"""


def measure(seconds: float) -> dict[str, Any]:
    """The figures of one process whose driver is the stand-in."""
    with tempfile.TemporaryDirectory() as folder:
        machine = StandIn(compile_stub(Path(folder)), Path(folder))
        machine.set(devices=DEVICES)
        header = f"SECONDS, DEVICES = {seconds!r}, {DEVICES}\n"
        # The stand-in's log of calls is for tests; writing it would be measured.
        found: dict[str, Any] = machine.run(header + PROGRAM, timeout_s=seconds * 2 + 120, NVML_STUB_LOG="")
    return found


def rows(found: dict[str, Any], percent: float) -> list[list[str]]:
    """The table: what, usually, at worst."""

    def row(what: str, spread: dict[str, float]) -> list[str]:
        return [what, f"{spread['median']:.1f} µs", f"{spread['p99']:.1f} µs"]

    boundary, rounds = found["boundary_us"], found["round_us"]
    return [
        [f"sampling {DEVICES} devices at 1 Hz", f"{percent:.3f} % of a core", f"limit {LIMIT_PERCENT} %"],
        row(f"one round of {DEVICES} devices (CPU)", rounds["usual"]),
        row("one round with the slow sensors (CPU)", rounds["with_slow_sensors"]),
        row("Sampler.latest", boundary["latest"]),
        row(f"HardwareGuard.observe, a new sample of {DEVICES}", boundary["observe_new"]),
        row("HardwareGuard.observe, nothing new", boundary["observe_nothing_new"]),
    ]


def main() -> int:
    parser = benchkit.parser(__doc__ or "")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to sample (default 60)")
    options = parser.parse_args()
    if compiler() is None:
        print("no C compiler here to build the stand-in NVML")
        return 1
    found = measure(options.seconds)
    percent = 100 * max(found["watching"] - found["idle"], 0.0)
    table = rows(found, percent)
    shown = benchkit.markdown_table(["what", "median", "99th percentile"], table)
    print(shown)
    result = {
        "environment": benchkit.environment(
            f"python benchmarks/monitor_cost.py --seconds {options.seconds:g}", "cpu", ["trainwarden", "nvidia-ml-py"]
        ),
        "devices": f"{DEVICES} scripted GPUs behind the real binding",
        "sampling_percent_of_one_core": round(percent, 4),
        "limit_percent": LIMIT_PERCENT,
        "within_limit": percent < LIMIT_PERCENT,
        **found,
    }
    benchkit.write_json(options.output / "monitor_cost.json", result)
    (options.output / "monitor_cost.md").write_text(shown + "\n", encoding="utf-8")
    return 0 if percent < LIMIT_PERCENT else 1


if __name__ == "__main__":
    raise SystemExit(main())
