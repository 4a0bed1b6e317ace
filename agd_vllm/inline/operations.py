"""What lies between the linear layers: the kernels of a device, or the rules as they are written."""

from __future__ import annotations

from types import ModuleType

import torch

from agd_vllm.attribution.rules import Activation, Norm, Rule, gated, rms_norm
from agd_vllm.kernels import compiled, streams, triton_support


class Operations:
    """On streams [2, N, ...], the value and its tangent; linear layers take and give `dtype`."""

    def __init__(self, rule: Rule, activation: Activation, dtype: torch.dtype, device: torch.device):
        self._rule = rule
        self._activation = activation
        self._dtype = dtype
        self._kernels = _kernels(device)

    def norm(self, streams_: torch.Tensor, norm: Norm, added: torch.Tensor | None = None) -> torch.Tensor:
        """Adds `added` to the residual streams (float32, contiguous) in place, and gives their norm for a linear
        layer."""
        return self._norm(streams_, norm, added, self._dtype)

    def exact_norm(self, streams_: torch.Tensor, norm: Norm, added: torch.Tensor | None = None) -> torch.Tensor:
        """As `norm`, in float32."""
        return self._norm(streams_, norm, added, torch.float32)

    def _norm(self, streams_: torch.Tensor, norm: Norm, added: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        if self._kernels is not None:
            return self._kernels.rms_norm(streams_, added, norm.gain, norm.eps, self._rule.through_norm, dtype)
        if added is not None:
            streams_ += added
        return rms_norm(streams_, norm.gain, norm.eps, self._rule).to(dtype)

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        """The gated product of gate and up, side by side: [2, N, 2 I] to [2, N, I]."""
        gate, up = gate_up.chunk(2, -1)
        if self._kernels is not None:
            return self._kernels.gated(gate, up, self._activation.name, self._rule.name)
        return gated(gate.float(), up.float(), self._activation, self._rule).to(gate_up.dtype)


def _kernels(device: torch.device) -> ModuleType | None:
    if device.type == "cuda" and triton_support.available():
        from agd_vllm.kernels import streams_triton

        return streams_triton
    return streams if device.type == "cpu" and compiled.available() else None
