"""Fused operations of a device against the rules as they are written."""

from types import ModuleType

import torch
from hypothesis import strategies as st

from agd_vllm.attribution import rules
from agd_vllm.attribution.rules import ACTIVATIONS, RULES

SIZES = {
    "num_streams": st.integers(1, 4),
    "rows": st.integers(1, 9),
    "dim": st.sampled_from([2, 16, 30, 64, 96, 130, 576]),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    "seed": st.integers(0, 2**16),
}
NORMS = SIZES | {"adds": st.booleans()}


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal to float32, or to one rounding where the result is bfloat16."""
    tolerance = 1e-5 if ours.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(ours.float(), theirs, rtol=tolerance, atol=1e-5 * float(theirs.abs().max()))


def check_rms_norm(kernels: ModuleType, num_streams, rows, dim, dtype, seed, rule, adds, device="cpu"):
    torch.manual_seed(seed)
    values, gain = torch.randn(num_streams, rows, dim, device=device) * 3, torch.randn(dim, device=device)
    added = torch.randn(num_streams, rows, dim, device=device).to(dtype) if adds else None
    summed = values + added.float() if adds else values.clone()
    ours = kernels.rms_norm(values, added, gain, 1e-5, RULES[rule].through_norm, dtype)
    assert ours.dtype == dtype
    assert torch.equal(values, summed)
    close(ours, rules.rms_norm(summed, gain, 1e-5, RULES[rule]))


def check_gated(kernels: ModuleType, num_streams, rows, dim, dtype, seed, rule, activation, device="cpu"):
    torch.manual_seed(seed)
    gate, up = (torch.randn(num_streams, rows, dim, device=device).mul(4).to(dtype) for _ in range(2))
    theirs = rules.gated(gate.float(), up.float(), ACTIVATIONS[activation], RULES[rule])
    ours = kernels.gated(gate, up, activation, rule)
    assert ours.dtype == dtype
    close(ours, theirs)


def check_gates_of_any_size(kernels: ModuleType, activation: str):
    gate = torch.tensor([[0.0, -0.0, 1e-30, 80.0, -80.0, 1e4, -1e4]]).expand(2, 1, 7).contiguous()
    up = torch.ones(2, 1, 7)
    theirs = rules.gated(gate, up, ACTIVATIONS[activation], RULES["attnlrp"])
    torch.testing.assert_close(kernels.gated(gate, up, activation, "attnlrp"), theirs, rtol=1e-5, atol=1e-30)


def check_not_a_number(kernels: ModuleType, dtype: torch.dtype):
    values = torch.randn(2, 3, 64)
    values[0, 1, 5] = float("nan")
    assert kernels.rms_norm(values, None, torch.ones(64), 1e-5, False, dtype)[:, 1].isnan().all()
    gate = torch.randn(2, 3, 64).to(dtype)
    gate[0, 2, 7] = float("nan")
    gated = kernels.gated(gate, torch.ones_like(gate), "silu", "attnlrp")
    assert gated[:, 2, 7].isnan().all() and gated[:, :2].isfinite().all()
