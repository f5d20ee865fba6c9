"""How many cores this process may use: its affinity, and the CPU quota of its container. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Cores that threads of this process can run on at once, at least 1; of a quota of 2.5 cores, 2."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_quota(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> float | None:
    """CPU time in each second that the process's control groups leave it, in cores; None where they set no limit.

    Reads version 2 (`cpu.max`) and version 1 (`cpu.cfs_quota_us`), of the group and of all above it. A container may
    see its own group as the root while its membership still shows the path on the host: what is not there is passed
    over.
    """
    limits = []
    for root, path, version in _groups(cgroups, membership):
        for group in (root / path, *(root / path).parents):
            with suppress(OSError, ValueError, IndexError):
                limits.append(_limit_v2(group) if version == 2 else _limit_v1(group))
            if group == root:
                break
    return min((limit for limit in limits if limit is not None), default=None)


def _groups(cgroups: Path, membership: Path) -> Iterator[tuple[Path, str, int]]:
    """(root of the hierarchy, path of the group below it, version) of those that may limit the CPU."""
    with suppress(OSError):
        for line in membership.read_text().splitlines():
            number, controllers, path = [*line.split(":", 2), "", ""][:3]
            if number == "0" and not controllers:
                yield cgroups, path.strip("/"), 2
            elif "cpu" in controllers.split(","):
                for name in dict.fromkeys((controllers, "cpu")):
                    yield cgroups / name, path.strip("/"), 1


def _limit_v2(group: Path) -> float | None:
    quota, period = (group / "cpu.max").read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def _limit_v1(group: Path) -> float | None:
    quota = int((group / "cpu.cfs_quota_us").read_text())
    return None if quota <= 0 else quota / int((group / "cpu.cfs_period_us").read_text())
