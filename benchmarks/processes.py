"""Which processes of a run took how much CPU time: what is neither vLLM's nor the scorer's is overhead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import psutil

# By the titles that vLLM and Ray give their processes.
KINDS = {
    "VLLM::": "vllm",
    "ray::AttributionWorker": "scorer",
    "ray::Replica": "engine actor",
}
OVERHEAD = ("engine actor", "driver", "ray")


def cpu_seconds(without: Collection[int] = ()) -> Counter[str]:
    """CPU seconds so far of this process (`driver`) and all below it, by kind; `without`: pids left out with theirs."""
    me = psutil.Process()
    left_out = {process.pid for pid in without for process in _tree(pid)}
    seconds = Counter({kind: 0.0 for kind in ("vllm", "scorer", *OVERHEAD)})
    for process in [me, *me.children(recursive=True)]:
        if process.pid in left_out:
            continue
        try:
            title, times = " ".join(process.cmdline()), process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        kind = "driver" if process == me else next((k for start, k in KINDS.items() if title.startswith(start)), "ray")
        seconds[kind] += times.user + times.system
    return seconds


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
