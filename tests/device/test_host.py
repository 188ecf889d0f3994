from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainwarden.device import Unknown, cpu_count, disk_free_bytes, host_memory

GIB = 2**30
SMALL = 64 * 2**20


class Cgroups:
    """A made-up /sys/fs/cgroup with its membership file."""

    def __init__(self, folder: Path, membership: str) -> None:
        self.root = folder / "cgroup"
        self.membership = folder / "membership"
        self.root.mkdir()
        self.membership.write_text(membership)

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def memory(self) -> tuple[int, int, str]:
        found = host_memory(root=self.root, membership=self.membership)
        return found.total_bytes, found.available_bytes, found.limit_source

    def cpus(self) -> float:
        return cpu_count(root=self.root, membership=self.membership)


@pytest.fixture
def unified(tmp_path: Path) -> Cgroups:
    return Cgroups(tmp_path, "0::/job/step\n")


@pytest.fixture
def legacy(tmp_path: Path) -> Cgroups:
    return Cgroups(tmp_path, "4:memory:/job\n3:cpuset:/\n2:cpu,cpuacct:/job\n0::/\n")


class TestHostMemory:
    def test_is_the_machines_when_nothing_limits_it(self, unified: Cgroups) -> None:
        total, available, source = unified.memory()
        assert (total, source) == (psutil.virtual_memory().total, "machine")
        assert 0 < available <= total

    def test_tells_what_this_process_holds(self) -> None:
        assert host_memory().process_bytes > 2**20

    @pytest.mark.parametrize("place", ["job/step", "job", "."])
    def test_is_limited_by_a_cgroup_of_the_process_or_above_it(self, unified: Cgroups, place: str) -> None:
        unified.write(f"{place}/memory.max", f"{SMALL}\n")
        unified.write(f"{place}/memory.current", f"{SMALL // 4}\n")
        assert unified.memory() == (SMALL, SMALL * 3 // 4, "cgroup")

    def test_takes_the_tightest_of_several_limits(self, unified: Cgroups) -> None:
        unified.write("job/memory.max", str(2 * SMALL))
        unified.write("job/memory.current", str(2 * SMALL - 1000))
        unified.write("job/step/memory.max", str(SMALL))
        unified.write("job/step/memory.current", "0")
        assert unified.memory() == (SMALL, 1000, "cgroup")

    def test_counts_file_cache_as_available_since_the_kernel_drops_it(self, unified: Cgroups) -> None:
        unified.write("job/step/memory.max", str(SMALL))
        unified.write("job/step/memory.current", str(SMALL))
        unified.write("job/step/memory.stat", f"anon 1\ninactive_file {SMALL // 2}\n")
        assert unified.memory()[1] == SMALL // 2

    def test_is_limited_by_the_older_hierarchy_too(self, legacy: Cgroups) -> None:
        legacy.write("memory/job/memory.limit_in_bytes", str(SMALL))
        legacy.write("memory/job/memory.usage_in_bytes", str(SMALL // 2))
        legacy.write("memory/memory.limit_in_bytes", "9223372036854771712")
        assert legacy.memory() == (SMALL, SMALL // 2, "cgroup")

    def test_ignores_the_limit_of_a_hierarchy_it_is_not_in(self, legacy: Cgroups) -> None:
        legacy.write("cpuset/memory.max", "1")
        assert legacy.memory()[2] == "machine"

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
    @given(
        limit=st.text(alphabet="0123456789-max \n", max_size=24),
        stat=st.text(max_size=40),
    )
    def test_survives_anything_in_the_kernels_files(self, unified: Cgroups, limit: str, stat: str) -> None:
        unified.write("job/step/memory.max", limit)
        unified.write("job/step/memory.current", limit)
        unified.write("job/step/memory.stat", stat)
        total, available, _ = unified.memory()
        assert total > 0
        assert available >= 0


class TestCpuCount:
    def test_is_the_affinity_of_the_process(self, unified: Cgroups) -> None:
        assert unified.cpus() == len(os.sched_getaffinity(0))

    def test_is_less_by_a_quota(self, unified: Cgroups) -> None:
        unified.write("job/cpu.max", "50000 100000\n")
        assert unified.cpus() == 0.5

    def test_is_not_limited_by_max(self, unified: Cgroups) -> None:
        unified.write("job/cpu.max", "max 100000\n")
        assert unified.cpus() == len(os.sched_getaffinity(0))

    def test_is_less_by_a_quota_of_the_older_hierarchy(self, legacy: Cgroups) -> None:
        legacy.write("cpu/job/cpu.cfs_quota_us", "25000")
        legacy.write("cpu/job/cpu.cfs_period_us", "100000")
        legacy.write("cpu/cpu.cfs_quota_us", "-1")
        legacy.write("cpu/cpu.cfs_period_us", "100000")
        assert legacy.cpus() == 0.25


class TestDiskFree:
    def test_is_that_of_the_file_system(self, tmp_path: Path) -> None:
        free = disk_free_bytes(tmp_path)
        assert isinstance(free, int)
        assert free == pytest.approx(psutil.disk_usage(str(tmp_path)).free, rel=0.05)

    def test_of_a_path_that_does_not_exist_yet_is_that_of_its_nearest_parent(self, tmp_path: Path) -> None:
        assert isinstance(disk_free_bytes(tmp_path / "runs" / "new"), int)

    def test_that_cannot_be_asked_is_unknown(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(path: str) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(psutil, "disk_usage", refuse)
        assert disk_free_bytes(tmp_path) == Unknown(f"Permission denied at {tmp_path}")
