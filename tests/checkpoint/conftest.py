import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # forked children must not wait for threads that were not forked with them


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 4 MiB."""
    mount = shutil.which("mount")
    point = tmp_path / "small"
    point.mkdir()
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(point)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield point
    subprocess.run(["umount", str(point)], check=True)
