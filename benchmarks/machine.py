"""A benchmark's JSON: its figures, and what they were measured on: hardware, versions, date."""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from agd_vllm.version import versions


def write_result(output: str | Path, result: dict[str, Any]) -> None:
    """`result` with the `hardware`, `versions` and `date` of its measurement."""
    Path(output).write_text(json.dumps({**result, **_measured_on()}, indent=2) + "\n")


def _measured_on() -> dict[str, Any]:
    return {
        "hardware": {
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(psutil.virtual_memory().total / 2**30),
            "gpus": gpu_names(),
        },
        "versions": {"python": platform.python_version(), **versions()},
        "date": datetime.date.today().isoformat(),
    }


@functools.cache
def gpu_names() -> list[str]:
    """Of a process that ends: whoever asks CUDA for names keeps a context, of half a GiB of each GPU."""
    if not torch.cuda.device_count():
        return []
    program = "import torch\nfor i in range(torch.cuda.device_count()): print(torch.cuda.get_device_name(i))"
    done = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.splitlines()


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as file:
        return next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown")
