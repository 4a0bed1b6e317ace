"""What an engine's environment says to vLLM and to what vLLM uses."""

import os

import pytest
import triton

from agd_vllm.engine import environment


@pytest.mark.parametrize(
    ("dtype", "on_cpu", "before", "expected"),
    [
        ("float32", False, None, "ieee"),
        ("float", False, None, "ieee"),
        ("float32", False, "tf32", "tf32"),
        ("float32", True, None, None),
        ("auto", False, None, None),
        ("bfloat16", False, None, None),
    ],
)
def test_float32_means_float32_to_triton_on_a_gpu(monkeypatch, dtype, on_cpu, before, expected):
    """As Triton reads it; a GPU is pretended."""
    kept = dict(os.environ)
    monkeypatch.setattr(environment, "on_cpu", lambda: on_cpu)
    try:
        os.environ.pop("TRITON_F32_DEFAULT", None)
        if before is not None:
            os.environ["TRITON_F32_DEFAULT"] = before
        environment.set_environment(None, dtype)
        assert triton.knobs.language.fp32_default == expected
    finally:
        os.environ.clear()
        os.environ.update(kept)


@pytest.mark.parametrize(
    ("cores", "ranks", "bound"),
    [([0, 1], 1, "0,1"), ([0, 1], 2, "0|1"), ([3, 4, 5], 2, "3,5|4"), ([7], 2, "7|7"), (None, 2, None)],
)
def test_each_rank_of_an_engine_on_a_cpu_has_a_list_of_cores(monkeypatch, cores, ranks, bound):
    """vLLM asserts that there are as many lists as ranks."""
    monkeypatch.setattr(os, "environ", {})
    environment.set_environment(cores, "auto", ranks)
    assert os.environ.get("VLLM_CPU_OMP_THREADS_BIND") == bound
