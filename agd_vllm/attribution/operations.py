"""What lies between the linear layers, in the pool and inline: the kernels of a device, or the rules as they are
written."""

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
        self.kernels = stream_kernels(device, dtype)

    def norm(self, streams_: torch.Tensor, norm: Norm, added: torch.Tensor | None = None) -> torch.Tensor:
        """Adds `added` to the residual streams (float32, contiguous) in place, and gives their norm for a linear
        layer."""
        return self._norm(streams_, norm, added, self._dtype)

    def exact_norm(self, streams_: torch.Tensor, norm: Norm, added: torch.Tensor | None = None) -> torch.Tensor:
        """As `norm`, in float32."""
        return self._norm(streams_, norm, added, torch.float32)

    def _norm(self, streams_: torch.Tensor, norm: Norm, added: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        if self.kernels is not None:
            return self.kernels.rms_norm(streams_, added, norm.gain, norm.eps, self._rule.through_norm, dtype)
        if added is not None:
            streams_ += added
        return rms_norm(streams_, norm.gain, norm.eps, self._rule).to(dtype)

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        """The gated product of gate and up, side by side: [2, N, 2 I] to [2, N, I]."""
        gate, up = gate_up.chunk(2, -1)
        if self.kernels is not None:
            return self.kernels.gated(gate, up, self._activation.name, self._rule.name)
        return gated(gate.float(), up.float(), self._activation, self._rule).to(gate_up.dtype)


def stream_kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """The module whose `rms_norm` and `gated` serve the device, with linear layers of that dtype."""
    if device.type == "cuda" and triton_support.available():
        from agd_vllm.kernels import streams_triton

        return streams_triton
    served = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and compiled.available()
    return streams if served else None
