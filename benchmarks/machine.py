"""A benchmark's JSON: its figures, and what they were measured on: hardware, versions, date."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import psutil
import torch

from agd_vllm.pipeline.versions import versions


def write_result(output: str | Path, result: dict[str, Any]) -> None:
    """`result` with the `hardware`, `versions` and `date` of its measurement."""
    Path(output).write_text(json.dumps({**result, **_measured_on()}, indent=2) + "\n")


def _measured_on() -> dict[str, Any]:
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
