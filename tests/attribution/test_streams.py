"""The fused operations of a CPU against the rules as they are written."""

import pytest
import stream_checks as checks
import torch
from hypothesis import given, settings

from agd_vllm.attribution.rules import ACTIVATIONS, RULES
from agd_vllm.kernels import streams


@pytest.mark.parametrize("rule", list(RULES))
@settings(max_examples=20, deadline=None)
@given(**checks.NORMS)
def test_rms_norm(rule, **case):
    checks.check_rms_norm(streams, **case, rule=rule)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("rule", list(RULES))
@settings(max_examples=20, deadline=None)
@given(**checks.SIZES)
def test_gated(rule, activation, **case):
    checks.check_gated(streams, **case, rule=rule, activation=activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_and_up_may_be_halves_of_one_tensor(dtype):
    both = torch.randn(2, 5, 2 * 130).to(dtype)
    gate, up = both.chunk(2, -1)
    halves = streams.gated(gate, up, "silu", "attnlrp")
    assert torch.equal(halves, streams.gated(gate.contiguous(), up.contiguous(), "silu", "attnlrp"))
    with pytest.raises(ValueError, match="equally far apart"):
        streams.gated(gate, up.contiguous(), "silu", "attnlrp")


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_gates_of_any_size_are_safe(activation):
    checks.check_gates_of_any_size(streams, activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_a_number_stays_so(dtype):
    checks.check_not_a_number(streams, dtype)


def test_streams_that_are_no_plain_rows_are_refused():
    with pytest.raises(ValueError, match="contiguous"):
        streams.rms_norm(torch.randn(1, 8, 4).transpose(1, 2), None, torch.ones(8), 1e-5, False, torch.float32)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        streams.rms_norm(torch.randn(1, 2, 8), torch.randn(1, 2, 8).double(), torch.ones(8), 1e-5, False, torch.float32)
