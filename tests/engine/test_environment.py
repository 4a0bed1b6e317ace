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
