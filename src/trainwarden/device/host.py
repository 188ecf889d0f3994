"""What the host says: memory, disk and processors, within the limits of the container around the process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from .values import Unknown, Value

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROC_CGROUP = Path("/proc/self/cgroup")
# cgroup v1 writes "no limit" as the largest multiple of the page size that fits a signed 64-bit integer.
_UNLIMITED_BYTES = 1 << 60


@dataclass(frozen=True, slots=True)
class HostMemory:
    """RAM in bytes. ``limit_source`` says whether the machine or a cgroup sets ``total_bytes``."""

    total_bytes: int
    available_bytes: int
    process_bytes: int
    """Resident set of this process."""
    limit_source: Literal["machine", "cgroup"]


def host_memory(*, root: Path = CGROUP_ROOT, membership: Path = PROC_CGROUP) -> HostMemory:
    """Memory that this process may still use: the machine's, or what a cgroup (container, Slurm) leaves."""
    machine = psutil.virtual_memory()
    total, available = int(machine.total), int(machine.available)
    source: Literal["machine", "cgroup"] = "machine"
    for folder in _groups(root, membership, "memory"):
        limit = _limit_bytes(folder)
        if limit is None:
            continue
        free = max(0, limit - _used_bytes(folder))
        available = min(available, free)
        if limit < total:
            total, source = limit, "cgroup"
    rss = int(psutil.Process().memory_info().rss)
    return HostMemory(total, available, rss, source)


def disk_free_bytes(path: Path) -> Value[int]:
    """Free bytes for this user where ``path`` is or, before it exists, where its nearest parent is."""
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return int(psutil.disk_usage(str(place)).free)
    except OSError as error:
        return Unknown(f"{error.strerror or error} at {place}")


def cpu_count(*, root: Path = CGROUP_ROOT, membership: Path = PROC_CGROUP) -> float:
    """Processors that this process may use: its affinity, or less by a cgroup quota (may be 1.5)."""
    try:
        allowed = float(len(os.sched_getaffinity(0)))
    except AttributeError:  # macOS and Windows have no affinity call
        allowed = float(os.cpu_count() or 1)
    quotas = [_quota(folder) for folder in _groups(root, membership, "cpu")]
    return min([allowed, *(quota for quota in quotas if quota is not None)])


def _groups(root: Path, membership: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's cgroup and its parents, innermost first, in both cgroup versions.

    Inside a container the membership file may name a path of the host that is not mounted here: its own
    limits then stand at the root of the mount, which is always among the folders.
    """
    for line in _read(membership).splitlines():
        _, names, path = (*line.split(":", 2), "", "")[:3]
        if names and controller not in names.split(","):
            continue
        base = root / controller if names else root
        folder = base / path.lstrip("/")
        while folder != base:
            yield folder
            folder = folder.parent
        yield base


def _limit_bytes(folder: Path) -> int | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        limit = _integer(_read(folder / name))
        if limit is not None and 0 < limit < _UNLIMITED_BYTES:
            return limit
    return None


def _used_bytes(folder: Path) -> int:
    """Memory that the kernel cannot take back: usage without the file cache that it would drop."""
    names = ("memory.current", "memory.usage_in_bytes")
    used = next((value for name in names if (value := _integer(_read(folder / name))) is not None), 0)
    counters = dict(line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
    cache = _integer(counters.get("total_inactive_file", counters.get("inactive_file", ""))) or 0
    return max(0, used - cache)


def _quota(folder: Path) -> float | None:
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    microseconds, each = _integer(quota), _integer(period)
    if microseconds is None or not each or microseconds <= 0 or each <= 0:
        return None
    return microseconds / each


def _integer(text: str) -> int | None:
    try:
        return int(text.strip())
    except ValueError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
