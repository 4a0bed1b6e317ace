"""What a figure was measured on: hardware, versions, date."""

from __future__ import annotations

import datetime
import os
import platform
from typing import Any

import psutil
import torch

from agd_vllm.pipeline.versions import versions


def describe() -> dict[str, Any]:
    """`hardware`, `versions` and `date`, for a benchmark's JSON."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "hardware": {
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(psutil.virtual_memory().total / 2**30),
            "gpus": gpus,
        },
        "versions": {"python": platform.python_version(), **versions()},
        "date": datetime.date.today().isoformat(),
    }


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as file:
        return next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown")
