"""Writes a line for each start of vLLM and Ray, in whatever process: this folder is on PYTHONPATH of all that tests
start, and both call what is named here of their own accord.

vLLM by the entry point beside this file, Ray by RAY_RUNTIME_ENV_HOOK and RAY_START_HOOK (tests/counted_starts.py).
"""

from __future__ import annotations

import os
from typing import Any

FILE = "AGD_STARTS_FILE"


def note(what: str) -> None:
    if path := os.environ.get(FILE):
        with open(path, "a") as file:
            file.write(f"{what}\n")


def vllm_plugin() -> None:
    """Called once in each process of vLLM. Of an engine's workers the first counts; engines that take turns in one
    process are one start, since the process is what takes long."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    init_device = WorkerWrapperBase.init_device

    def noted(self: WorkerWrapperBase) -> None:
        if self.rpc_rank == 0:
            note("vLLM")
            WorkerWrapperBase.init_device = init_device
        init_device(self)

    WorkerWrapperBase.init_device = noted


def ray_init(runtime_env: Any) -> Any:
    # With an address Ray is joined.
    if not os.environ.get("RAY_ADDRESS"):
        note("Ray")
    return runtime_env


def ray_start(_params: Any, head: bool) -> None:
    if head:
        note("Ray")
