"""The operations of the tangent pass outside attention: the rules as they are written, or the kernels of a device."""

from __future__ import annotations

from types import ModuleType
from typing import Protocol

import torch

from agd_vllm.attribution.adapters import Decoder, Linear
from agd_vllm.attribution.hf_model import HFModel
from agd_vllm.attribution.rules import Norm, Rule, gated, linear, rms_norm
from agd_vllm.kernels import compiled, streams, triton_support

PACKED_FOR_ROWS = 32
"""Rows of a product that oneDNN lays weights out for: a few guided steps. For more the same layout is good, too."""


class Operations(Protocol):
    """On streams [S, ..., d], stream 0 the value; see `rules` for what each does."""

    def norm(self, streams: torch.Tensor, norm: Norm, added: torch.Tensor | None = None) -> torch.Tensor:
        """Adds `added` to `streams` (float32, contiguous) in place, and gives their norm for a linear layer."""

    def exact_norm(self, streams: torch.Tensor, norm: Norm, added: torch.Tensor | None = None) -> torch.Tensor:
        """As `norm`, in float32, for what is no linear layer."""

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        """The gated product of gate and up, side by side: [S, N, 2 I] to [S, N, I]."""

    def linear(self, streams: torch.Tensor, layer: Linear) -> torch.Tensor:
        """[S, N, in] to [S, N, out] in the weight's dtype."""


class TorchOperations:
    """On any device."""

    def __init__(self, decoder: Decoder, rule: Rule):
        self._activation = decoder.activation
        self._rule = rule

    def norm(self, streams: torch.Tensor, norm: Norm, added: torch.Tensor | None = None) -> torch.Tensor:
        return self.exact_norm(streams, norm, added)

    def exact_norm(self, streams: torch.Tensor, norm: Norm, added: torch.Tensor | None = None) -> torch.Tensor:
        if added is not None:
            streams += added
        return rms_norm(streams, norm.gain, norm.eps, self._rule)

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.float().chunk(2, -1)
        return gated(gate, up, self._activation, self._rule)

    def linear(self, streams: torch.Tensor, layer: Linear) -> torch.Tensor:
        return linear(streams, layer.weight, layer.bias)


class FusedOperations(TorchOperations):
    """By the kernels of a device: `kernels` is `agd_vllm.kernels.streams` or its like for a GPU."""

    def __init__(self, decoder: Decoder, rule: Rule, kernels: ModuleType):
        super().__init__(decoder, rule)
        self._kernels = kernels
        self._dtype = decoder.layers[0].qkv.weight.dtype

    def norm(self, streams: torch.Tensor, norm: Norm, added: torch.Tensor | None = None) -> torch.Tensor:
        return self._rms_norm(streams, added, norm, self._dtype)

    def exact_norm(self, streams: torch.Tensor, norm: Norm, added: torch.Tensor | None = None) -> torch.Tensor:
        return self._rms_norm(streams, added, norm, torch.float32)

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._kernels.gated(*gate_up.chunk(2, -1), self._activation.name, self._rule.name)

    def _rms_norm(
        self, streams: torch.Tensor, added: torch.Tensor | None, norm: Norm, dtype: torch.dtype
    ) -> torch.Tensor:
        return self._kernels.rms_norm(streams, added, norm.gain, norm.eps, self._rule.through_norm, dtype)


class PackedOperations(FusedOperations):
    """On a CPU with a compiler: oneDNN lays the weights of the linear layers out anew."""

    def __init__(self, decoder: Decoder, rule: Rule):
        super().__init__(decoder, rule, streams)
        for layer in decoder.layers:
            for each in (layer.qkv, layer.o, layer.gate_up, layer.down):
                each.weight = torch.ops.mkldnn._reorder_linear_weight(each.weight, PACKED_FOR_ROWS)

    def linear(self, streams: torch.Tensor, layer: Linear) -> torch.Tensor:
        rows = streams.flatten(0, 1).to(self._dtype)
        out = torch.ops.mkldnn._linear_pointwise(rows, layer.weight, None, "none", [], "")
        out = out.unflatten(0, streams.shape[:2])
        if layer.bias is not None:
            out[0] += layer.bias
        return out


def operations(hf: HFModel, decoder: Decoder, rule: Rule) -> Operations:
    """The fastest ones that this device has."""
    if hf.device.type == "cpu" and _can_pack(hf.unembedding.dtype) and compiled.available():
        return PackedOperations(decoder, rule)
    if hf.device.type == "cuda" and triton_support.available():
        from agd_vllm.kernels import streams_triton

        return FusedOperations(decoder, rule, streams_triton)
    return TorchOperations(decoder, rule)


def _can_pack(dtype: torch.dtype) -> bool:
    """oneDNN multiplies bfloat16 only on CPUs with instructions for it."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
