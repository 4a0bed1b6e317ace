"""The fused operations of a CPU against the rules as they are written."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agd_vllm.attribution import rules
from agd_vllm.attribution.rules import ACTIVATIONS, RULES
from agd_vllm.kernels import streams

SIZES = {
    "num_streams": st.integers(1, 4),
    "rows": st.integers(1, 9),
    "dim": st.sampled_from([2, 16, 30, 64, 96, 130, 576]),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    "seed": st.integers(0, 2**16),
}


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal to float32, or to one rounding where the result is bfloat16."""
    tolerance = 1e-5 if ours.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(ours.float(), theirs, rtol=tolerance, atol=1e-5 * float(theirs.abs().max()))


@settings(max_examples=80, deadline=None)
@given(**SIZES, rule=st.sampled_from(list(RULES)), adds=st.booleans())
def test_rms_norm(num_streams, rows, dim, dtype, seed, rule, adds):
    torch.manual_seed(seed)
    values, gain = torch.randn(num_streams, rows, dim) * 3, torch.randn(dim)
    added = torch.randn(num_streams, rows, dim).to(dtype) if adds else None
    summed = values + added.float() if adds else values.clone()
    ours = streams.rms_norm(values, added, gain, 1e-5, RULES[rule].through_norm, dtype)
    assert ours.dtype == dtype
    assert torch.equal(values, summed)
    close(ours, rules.rms_norm(summed, gain, 1e-5, RULES[rule]))


@settings(max_examples=80, deadline=None)
@given(**SIZES, heads=st.integers(1, 4), scale=st.sampled_from([1.0, 0.125]))
def test_rope(num_streams, rows, dim, dtype, seed, heads, scale):
    torch.manual_seed(seed)
    values = torch.randn(num_streams, rows, heads, dim).to(dtype)
    cos, sin = torch.randn(rows, 1, dim), torch.randn(rows, 1, dim)
    close(streams.rope(values, cos, sin, scale), rules.rope(values.float(), cos, sin) * scale)


@settings(max_examples=80, deadline=None)
@given(**SIZES, rule=st.sampled_from(list(RULES)), activation=st.sampled_from(list(ACTIVATIONS)))
def test_gated(num_streams, rows, dim, dtype, seed, rule, activation):
    torch.manual_seed(seed)
    gate, up = (torch.randn(num_streams, rows, dim).mul(4).to(dtype) for _ in range(2))
    theirs = rules.gated(gate.float(), up.float(), ACTIVATIONS[activation], RULES[rule])
    close(streams.gated(gate, up, activation, rule), theirs)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_gates_of_any_size_are_safe(activation):
    gate = torch.tensor([[0.0, -0.0, 1e-30, 80.0, -80.0, 1e4, -1e4]]).expand(2, 1, 7).contiguous()
    up = torch.ones(2, 1, 7)
    theirs = rules.gated(gate, up, ACTIVATIONS[activation], RULES["attnlrp"])
    torch.testing.assert_close(streams.gated(gate, up, activation, "attnlrp"), theirs, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_a_number_stays_so(dtype):
    values = torch.randn(2, 3, 64)
    values[0, 1, 5] = float("nan")
    assert streams.rms_norm(values, None, torch.ones(64), 1e-5, False, dtype)[:, 1].isnan().all()
    gate = torch.randn(2, 3, 64).to(dtype)
    gate[0, 2, 7] = float("nan")
    gated = streams.gated(gate, torch.ones_like(gate), "silu", "attnlrp")
    assert gated[:, 2, 7].isnan().all() and gated[:, :2].isfinite().all()


def test_streams_that_are_no_plain_rows_are_refused():
    with pytest.raises(ValueError, match="contiguous"):
        streams.rope(torch.randn(1, 4, 2, 8).transpose(1, 2), torch.ones(2, 1, 8), torch.ones(2, 1, 8), 1.0)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        streams.rope(torch.randn(1, 2, 2, 8).double(), torch.ones(2, 1, 8), torch.ones(2, 1, 8), 1.0)
