"""CPUs that a process may use: quotas of control groups, versions 1 and 2, and the affinity mask."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from pipelines.cpu_quota import cpu_quota, usable_cpus

CPU_V1 = Path("/sys/fs/cgroup/cpu")


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v1(quota: str, group: str = "", controllers: str = "cpu,cpuacct") -> dict[str, str]:
    folder = f"sys/fs/cgroup/{controllers}/{group}"
    return {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(
    ("files", "quota", "cpus"),
    [
        ({}, None, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4.0, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2.5, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "9900000 100000\n"}, 99.0, 8),
        (  # a group above limits
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000",
                "sys/fs/cgroup/a/cpu.max": "300000 100000",
            },
            3.0,
            3,
        ),
        ({"proc/self/cgroup": "4:cpu,cpuacct:/\n", **v1("-1\n")}, None, 8),
        ({"proc/self/cgroup": "4:cpu,cpuacct:/job\n", **v1("200000\n", "job")}, 2.0, 2),
        ({"proc/self/cgroup": "1:cpu:/job\n3:cpuset:/job\n", **v1("200000\n", "job", "cpu")}, 2.0, 2),
        ({"proc/self/cgroup": "4:cpu,cpuacct:/docker/0123\n", **v1("200000\n")}, 2.0, 2),  # the host's path
        ({"proc/self/cgroup": "0::/x\n", "sys/fs/cgroup/unified/x/cpu.max": "100000 100000"}, 1.0, 1),
    ],
)
def test_quota_of_the_groups_limits_the_cpus(tmp_path: Path, files: dict[str, str], quota: float, cpus: int) -> None:
    root = write(tmp_path, files)
    assert cpu_quota(root) == quota
    assert usable_cpus(root, affinity=8) == cpus


def test_affinity_mask_limits_the_cpus() -> None:
    one = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{one}}}); from pipelines.cpu_quota import usable_cpus; print(usable_cpus())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


def test_real_group_with_a_quota_limits_the_cpus() -> None:
    group = CPU_V1 / f"rediffuse-{uuid.uuid4().hex[:8]}"
    try:
        group.mkdir()
        (group / "cpu.cfs_quota_us").write_text("100000")
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"no writable cgroup of version 1: {error.strerror}")
    code = (
        f"import os; open('{group}/cgroup.procs', 'w').write(str(os.getpid()))\n"
        "from pipelines.cpu_quota import cpu_quota, usable_cpus; print(cpu_quota(), usable_cpus())"
    )
    try:
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    finally:
        group.rmdir()
    assert result.stdout == "1.0 1\n"
