"""A container's limits, by made files of both versions of control groups, and by those of this machine."""

import os
import subprocess
import sys

import psutil
import pytest

from agd_vllm.models import host

GIB = 1 << 30
NONE_V1 = "9223372036854771712"


def made(folder, groups: str, files: dict[str, str]):
    """A root folder with what a process of these `groups` finds."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = folder / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return folder


@pytest.fixture
def large_host(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(128)))


class Memory:
    total = 512 * GIB


V2, V1 = "0::/pod/app\n", "4:memory:/pod/app\n3:cpu,cpuacct:/pod/app\n1:name=systemd:/\n"


@pytest.mark.parametrize(
    ("groups", "files", "gib"),
    [
        (V2, {"pod/app/memory.max": f"{8 * GIB}"}, 8),
        (V2, {"pod/app/memory.max": "max", "pod/memory.max": f"{16 * GIB}"}, 16),
        (V2, {"pod/app/memory.max": "max", "memory.max": "max"}, 512),
        (V2, {"pod/app/memory.max": f"{4096 * GIB}"}, 512),
        # A container sees its own group's files at the top.
        (V2, {"memory.max": f"{8 * GIB}"}, 8),
        ("0::/\n", {"memory.max": f"{8 * GIB}"}, 8),
        (V1, {"memory/pod/app/memory.limit_in_bytes": f"{8 * GIB}"}, 8),
        (V1, {"memory/pod/app/memory.limit_in_bytes": NONE_V1}, 512),
        (V1, {"memory/memory.limit_in_bytes": f"{8 * GIB}"}, 8),
        ("", {}, 512),
    ],
)
def test_the_lowest_memory_limit_counts(large_host, tmp_path, groups, files, gib):
    assert host.memory_bytes(made(tmp_path, groups, files)) == gib * GIB


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        (V2, {"pod/app/cpu.max": "400000 100000"}, 4),
        (V2, {"pod/app/cpu.max": "50000 100000"}, 1),
        (V2, {"pod/app/cpu.max": "max 100000", "pod/cpu.max": "250000 100000"}, 3),
        (V2, {"pod/app/cpu.max": "max 100000"}, 128),
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "400000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 4),
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 128),
        ("", {}, 128),
    ],
)
def test_the_lowest_share_of_cpu_time_counts(large_host, tmp_path, groups, files, cores):
    assert host.usable_cores(made(tmp_path, groups, files)) == cores


def test_the_affinity_counts_too(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 4, 5, 9})
    assert host.usable_cores(made(tmp_path, V2, {"pod/app/cpu.max": "max 100000"})) == 4


def test_engine_and_worker_take_an_eighth_of_the_limit(monkeypatch, smollm2):
    from agd_vllm.attribution import forward
    from agd_vllm.engine import engine as engine_module
    from agd_vllm.engine.engine import Engine
    from agd_vllm.engine.settings import EngineSettings
    from agd_vllm.models.inspect import inspect_model
    from agd_vllm.trace import Tracer

    for module in (forward, engine_module):
        monkeypatch.setattr(module, "memory_bytes", lambda: 8 * GIB)
    info, _ = inspect_model(str(smollm2))
    args = Engine(info, EngineSettings(), Tracer(False))._engine_args()
    assert args["kv_cache_memory_bytes"] == GIB
    assert forward.default_cache_bytes(forward.torch.device("cpu")) == GIB


def test_this_machines_own_files_are_read():
    """In a process of its own with one core."""
    code = "from agd_vllm.models.host import *; print(usable_cores(), memory_bytes())"
    core = min(os.sched_getaffinity(0))
    command = [sys.executable, "-c", f"import os; os.sched_setaffinity(0, [{core}]); {code}"]
    cores, memory = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert cores == 1
    assert 0 < memory <= psutil.virtual_memory().total
