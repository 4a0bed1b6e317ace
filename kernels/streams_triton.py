"""What lies between the linear layers of the tangent pass, on an NVIDIA GPU: one launch and one pass over memory each.

The functions are those of `streams`, the same for a CPU; the rules and the twins in PyTorch stand in
`agd_vllm.attribution.rules`. Streams are contiguous and of any floating dtype; arithmetic is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from agd_vllm.kernels.streams import ACTIVATIONS, RULES

ELEMENTS_PER_WARP = 512
MAX_WARPS = 16
GATED_BLOCK, GATED_WARPS = 1024, 4


def rms_norm(
    streams: torch.Tensor,
    added: torch.Tensor | None,
    gain: torch.Tensor,
    eps: float,
    through_norm: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Adds `added` to `streams` [S, ..., d] (float32), in place, and gives their norm in `dtype`."""
    _check(streams, gain, *(() if added is None else (added,)))
    out = torch.empty_like(streams, dtype=dtype)
    dim = streams.shape[-1]
    rows, block = streams[0].numel() // dim, triton.next_power_of_2(dim)
    _rms_norm[(rows,)](
        streams,
        streams if added is None else added,
        gain,
        out,
        streams.shape[0],
        rows,
        dim,
        eps,
        ADDED=added is not None,
        THROUGH_NORM=through_norm,
        BLOCK=block,
        num_warps=_warps(block),
    )
    return out


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str, rule: str) -> torch.Tensor:
    """Gate and up [S, N, I] of one dtype to [S, N, I] of the same; they may be the halves of one [S, N, 2 I]."""
    num_streams, rows, dim = gate.shape
    if gate.stride() != up.stride() or gate.stride(2) != 1 or gate.stride(0) != rows * gate.stride(1):
        raise ValueError(f"rows must be contiguous and equally far apart, not {gate.stride()}, {up.stride()}")
    out = gate.new_empty(gate.shape)
    _gated[(rows, triton.cdiv(dim, GATED_BLOCK))](
        gate,
        up,
        out,
        num_streams,
        rows,
        dim,
        gate.stride(1),
        SILU=activation == ACTIVATIONS[0],
        RULE=RULES.index(rule),
        BLOCK=GATED_BLOCK,
        num_warps=GATED_WARPS,
    )
    return out


@triton.jit(do_not_specialize=["num_streams", "rows"])
def _rms_norm(
    streams,
    added,
    gain,
    out,
    num_streams,
    rows,
    dim,
    eps,
    ADDED: tl.constexpr,
    THROUGH_NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: all of its streams, the value first."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    there = columns < dim
    weights = tl.load(gain + columns, mask=there, other=0.0)
    value = _summed(streams, added, row * dim + columns, there, ADDED)
    scale = 1 / tl.sqrt_rn(tl.sum(value * value, 0) / dim + eps)
    tl.store(out + row * dim + columns, value * (scale * weights), mask=there)
    for stream in range(1, num_streams):
        at = (stream * rows + row) * dim + columns
        tangent = _summed(streams, added, at, there, ADDED)
        if THROUGH_NORM:
            tangent -= value * (tl.sum(tangent * value, 0) / dim * scale * scale)
        tl.store(out + at, tangent * (scale * weights), mask=there)


@triton.jit
def _summed(streams, added, at, there, ADDED: tl.constexpr):
    x = tl.load(streams + at, mask=there, other=0.0)
    if ADDED:
        x += tl.load(added + at, mask=there, other=0.0).to(tl.float32)
        tl.store(streams + at, x, mask=there)
    return x


@triton.jit(do_not_specialize=["num_streams", "rows"])
def _gated(
    gates,
    ups,
    out,
    num_streams,
    rows,
    dim,
    stride,
    SILU: tl.constexpr,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one row: all of its streams. RULE is its place in RULES."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = columns < dim
    at = row * stride + columns
    gate = tl.load(gates + at, mask=there, other=0.0).to(tl.float32)
    up = tl.load(ups + at, mask=there, other=0.0).to(tl.float32)
    # phi(g) / g: silu's is the sigmoid, and (1 + tanh z) / 2 is the sigmoid of 2 z (the tanh approximation of GELU).
    if SILU:
        ratio = tl.sigmoid(gate)
        slope = ratio + gate * ratio * (1 - ratio)
    else:
        ratio = tl.sigmoid(1.5957691216 * (gate + 0.044715 * gate * gate * gate))
        slope = ratio + gate * ratio * (1 - ratio) * 1.5957691216 * (1 + 3 * 0.044715 * gate * gate)
    tl.store(out + row * dim + columns, gate * ratio * up, mask=there)
    if RULE == 0:
        on_gate, on_up = ratio * up / 2, ratio * gate / 2
    else:
        on_gate, on_up = slope * up, ratio * gate
    for stream in range(1, num_streams):
        line = stream * rows + row
        at = line * stride + columns
        tangent = on_up * tl.load(ups + at, mask=there, other=0.0).to(tl.float32)
        if RULE != 1:
            tangent += on_gate * tl.load(gates + at, mask=there, other=0.0).to(tl.float32)
        tl.store(out + line * dim + columns, tangent, mask=there)


def _warps(elements: int) -> int:
    return max(1, min(MAX_WARPS, elements // ELEMENTS_PER_WARP))


def _check(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise ValueError(f"must be contiguous, not {tensor.stride()}")
