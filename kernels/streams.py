"""What lies between the linear layers of the tangent pass, on a CPU: one pass over memory each, rounding included.

Streams are float32 or bfloat16 and contiguous, rows of a gated product may lie further apart; arithmetic is float32.
The rules and the twins in PyTorch stand in `agd_vllm.attribution.rules`. To be used where `compiled.available()`.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from agd_vllm.kernels import compiled

ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
RULES = ("attnlrp", "cplrp", "ixg")


class _Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("half", ctypes.c_int32)]


def rms_norm(
    streams: torch.Tensor,
    added: torch.Tensor | None,
    gain: torch.Tensor,
    eps: float,
    through_norm: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Adds `added` to `streams` [S, ..., d] (float32), in place, and gives their norm in `dtype`."""
    _check(streams, gain)
    out = torch.empty_like(streams, dtype=dtype)
    rows = streams[0].numel() // streams.shape[-1]
    _function("agd_rms_norm")(
        streams.data_ptr(),
        _rows(added),
        gain.data_ptr(),
        _rows(out),
        streams.shape[0],
        rows,
        streams.shape[-1],
        eps,
        through_norm,
    )
    return out


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str, rule: str) -> torch.Tensor:
    """Gate and up [S, N, I] of one dtype to [S, N, I] of the same; they may be the halves of one [S, N, 2 I]."""
    out = gate.new_empty(gate.shape)
    kinds = ACTIVATIONS.index(activation), RULES.index(rule)
    gate, up = gate.flatten(0, 1), up.flatten(0, 1)
    if gate.stride() != up.stride() or gate.stride(1) != 1:
        raise ValueError(f"rows must be contiguous and equally far apart, not {gate.stride()}, {up.stride()}")
    _function("agd_gated")(_kind(gate), _kind(up), gate.stride(0), _kind(out), *out.shape, *kinds)
    return out


def _check(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        if not tensor.is_contiguous() or tensor.dtype != torch.float32:
            raise ValueError(f"must be contiguous float32, not {tensor.dtype}, {tensor.stride()}")


def _rows(tensor: torch.Tensor | None):
    if tensor is None:
        return ctypes.byref(_Rows(None, 0))
    if not tensor.is_contiguous():
        raise ValueError(f"streams must be contiguous, not {tensor.stride()}")
    return _kind(tensor)


def _kind(tensor: torch.Tensor):
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"streams must be float32 or bfloat16, not {tensor.dtype}")
    return ctypes.byref(_Rows(tensor.data_ptr(), tensor.dtype == torch.bfloat16))


@functools.cache
def _function(name: str):
    pointer, rows, size, kind = ctypes.c_void_p, ctypes.POINTER(_Rows), ctypes.c_int64, ctypes.c_int32
    function = getattr(compiled.library(), name)
    function.restype = None
    function.argtypes = {
        "agd_rms_norm": [pointer, rows, pointer, rows, size, size, size, ctypes.c_float, kind],
        "agd_gated": [rows, rows, size, rows, size, size, size, kind, kind],
    }[name]
    return function
