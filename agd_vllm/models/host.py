"""How much of a machine without GPUs this process may use: a container's limits count where they are lower.

Linux's control groups, of both versions: version 2 has `memory.max` and `cpu.max`, version 1 `memory.limit_in_bytes`
and `cpu.cfs_quota_us` over `cpu.cfs_period_us` (the kernel's Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil


def memory_bytes(root: Path = Path("/")) -> int:
    """Memory of the machine, or what this process's control groups leave of it."""
    limits = [*_numbers(root, "", "memory.max"), *_numbers(root, "memory", "memory.limit_in_bytes")]
    # Version 1 has a number close to 2^63 where there is no limit.
    return min([psutil.virtual_memory().total, *(int(limit[0]) for limit in limits)])


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may run on, or the CPU time that its control groups leave it, rounded up."""
    shares = [quota / period for quota, period in _numbers(root, "", "cpu.max")]
    quotas = _numbers(root, "cpu", "cpu.cfs_quota_us")
    periods = _numbers(root, "cpu", "cpu.cfs_period_us")
    # A quota of -1 is none.
    shares += [quota[0] / period[0] for quota, period in zip(quotas, periods, strict=False) if quota[0] > 0]
    return min([len(os.sched_getaffinity(0)), *(max(1, math.ceil(share)) for share in shares)])


def _numbers(root: Path, controller: str, name: str) -> Iterator[list[float]]:
    """The numbers in the files `name` of this process's groups, from its own to the topmost; none where "max" stands
    for no limit. `controller`: of version 1; "" is version 2."""
    for folder in _groups(root, controller):
        try:
            words = (folder / name).read_text().split()
        except OSError:
            continue
        if words and words[0] != "max":
            yield [float(word) for word in words]


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's groups. In a container the path that the kernel names may not be there: the topmost
    folder is then the container's own."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controllers if controller else "")
        own = Path(path.lstrip("/"))
        yield from (top / part for part in (own, *own.parents))
