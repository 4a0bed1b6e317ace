"""The fused operations of a GPU against the rules as they are written."""

import pytest
import stream_checks as checks
import torch
from hypothesis import given, settings

from agd_vllm.attribution.rules import ACTIVATIONS, RULES
from agd_vllm.kernels import streams_triton


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """So that a few hundred elements are several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams_triton, "GATED_BLOCK", 128)
        yield


@pytest.mark.parametrize("rule", list(RULES))
@settings(max_examples=10, deadline=None)
@given(**checks.NORMS)
def test_rms_norm(rule, **case):
    checks.check_rms_norm(streams_triton, **case, rule=rule)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("rule", list(RULES))
@settings(max_examples=10, deadline=None)
@given(**checks.SIZES)
def test_gated(rule, activation, **case):
    checks.check_gated(streams_triton, **case, rule=rule, activation=activation)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_gates_of_any_size_are_safe(activation):
    checks.check_gates_of_any_size(streams_triton, activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_a_number_stays_so(dtype):
    checks.check_not_a_number(streams_triton, dtype)


def test_streams_that_are_no_plain_rows_are_refused():
    with pytest.raises(ValueError, match="contiguous"):
        streams_triton.rms_norm(torch.randn(1, 8, 4).transpose(1, 2), None, torch.ones(8), 1e-5, False, torch.float32)
