"""CPUs that this process may use: the affinity mask and the quotas of its control groups (cgroups)."""

from __future__ import annotations

import os
from pathlib import Path

CPU_CONTROLLERS = ("cpu", "cpu,cpuacct")


def usable_cpus(root: Path = Path("/"), affinity: int | None = None) -> int:
    """Return the whole CPUs that this process may use, at least 1.

    It is the smaller of ``affinity`` (default: this process's mask) and the cgroup quota, rounded down. ``root``: the folder
    that holds proc and sys.
    """
    if affinity is None:
        affinity = len(os.sched_getaffinity(0))
    quota = cpu_quota(root)
    return affinity if quota is None else max(min(affinity, int(quota + 1e-9)), 1)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the smallest CPU quota of this process's cgroup and of the groups above it, in CPUs; None without a quota.

    Reads cpu.max of version 2, and cpu.cfs_quota_us and cpu.cfs_period_us of version 1. In a container, the path in
    /proc/self/cgroup may be the host's: the mounted root is then the container's own group and is read too.
    """
    quotas = [quota for folder in _groups(root) if (quota := _quota_of(folder)) is not None]
    return min(quotas, default=None)


def _groups(root: Path) -> list[Path]:
    """Return the folders of this process's groups that limit CPUs, and of all groups above them."""
    mounts = root / "sys/fs/cgroup"
    folders: list[Path] = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            bases = [mounts, mounts / "unified"]
        elif "cpu" in controllers.split(","):
            bases = [mounts / name for name in dict.fromkeys((controllers, *CPU_CONTROLLERS))]
        else:
            continue
        relative = path.strip("/")
        for base in bases:
            group = base / relative
            folders += [each for each in (group, *group.parents) if each == base or base in each.parents]
    return list(dict.fromkeys(folders))


def _quota_of(group: Path) -> float | None:
    limit, _, period = _text(group / "cpu.max").strip().partition(" ")
    if not limit:
        limit, period = (_text(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    try:
        quota = int(limit) / int(period or 100_000)
    except (ValueError, ZeroDivisionError):  # no such file, or "max"
        return None
    return quota if quota > 0 else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
