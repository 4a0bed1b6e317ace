"""The Triton kernels: interpreted on a CPU, compiled for GPUs that are not here, and done without."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from conftest import CHECKOUT

from agd_vllm.attribution import paged_twin
from agd_vllm.attribution.tangent_pass import attention_kernel
from agd_vllm.kernels import triton_support
from agd_vllm.kernels.tilings import DECODE, PREFILL, choose_tiling, num_splits


def test_interpreted_kernels_equal_their_twins():
    """In a process of its own: Triton must know that it interprets before anything imports it, and vLLM does."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_they_compile_for_gpus_and_fit_them():
    """Registers that spill by the kilobyte would be a kernel that runs at the speed of memory."""
    command = [sys.executable, str(CHECKOUT / "tests/compile_kernels.py")]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(kernel["kernel"], kernel["gpu"]) for kernel in kernels} == {
        *((name, 90) for name in ("_measure", "_decide", "_rms_norm", "_gated")),
        *((name, gpu) for name in ("attend", "decode", "combine", "prepare") for gpu in (80, 90)),
    }
    for kernel in kernels:
        assert kernel["shared_bytes"] <= kernel["shared_limit"], kernel
        assert kernel["spilled_bytes"] <= (0 if kernel["kernel"] == "decode" else 1024), kernel
        if kernel["kernel"] not in ("_decide", "combine", "prepare"):
            assert kernel["widest_load"] == 128, kernel


@pytest.fixture
def fresh():
    triton_support.available.cache_clear()
    yield
    triton_support.available.cache_clear()


@pytest.mark.parametrize("trouble", ["missing", "too old"])
def test_without_triton_the_twins_are_used_after_one_warning(fresh, monkeypatch, caplog, trouble):
    if trouble == "missing":
        monkeypatch.setitem(sys.modules, "triton", None)
    else:
        monkeypatch.setattr("triton.__version__", "2.3.1")
    with caplog.at_level(logging.WARNING, "agd_vllm"):
        for _ in range(2):
            assert attention_kernel(torch.device("cuda"), 64, torch.bfloat16) is paged_twin
    (record,) = caplog.records
    assert record.message.startswith("the GPU is used without kernels of its own, which is slower: ")
    assert record.message.endswith("(needs triton>=3.4)")


@pytest.mark.parametrize(
    ("shared", "head_dim", "rows"),
    [(227, 64, 128), (227, 128, 128), (227, 256, 64), (163, 128, 64), (99, 128, 32), (99, 64, 64), (64, 256, 16)],
)
def test_tiles_fit_the_shared_memory_that_there_is(shared, head_dim, rows):
    """KiB of a Hopper, an Ampere and smaller cards."""
    tiling = choose_tiling(PREFILL, head_dim, 4, shared << 10)
    assert tiling.rows == rows
    assert tiling.shared_bytes(head_dim) <= shared << 10
    assert choose_tiling(DECODE, head_dim, 4, shared << 10).rows == 16
    assert choose_tiling(DECODE, head_dim, 20, shared << 10).rows == 32


def test_keys_are_shared_out_only_where_programs_are_few():
    assert num_splits(programs=64 * 8, longest=4096, processors=132) == 2
    assert num_splits(programs=1 * 8, longest=4096, processors=132) == 8
    assert num_splits(programs=1 * 8, longest=100_000, processors=132) == 64
    assert num_splits(programs=1 * 8, longest=600, processors=132) == 1
    assert num_splits(programs=5000, longest=4096, processors=132) == 1
