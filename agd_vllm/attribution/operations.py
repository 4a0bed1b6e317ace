"""The operations of the tangent pass outside attention: the rules as they are written, or the kernels of a device."""

from __future__ import annotations

from types import ModuleType
from typing import Protocol

import torch
from torch import nn

from agd_vllm.attribution.adapters import Decoder, Layer
from agd_vllm.attribution.hf_model import HFModel
from agd_vllm.attribution.rules import Norm, Rule, gated, linear, rms_norm, rope
from agd_vllm.kernels import compiled, streams, triton_support

PACKED_FOR_ROWS = 32
"""Rows of a product that oneDNN lays weights out for: a few guided steps. For more the same layout is good, too."""


class Operations(Protocol):
    """On streams [S, ..., d], stream 0 the value; see `rules` for what each does."""

    def norm(self, streams: torch.Tensor, norm: Norm, added: torch.Tensor | None = None) -> torch.Tensor:
        """Adds `added` to `streams` (float32, contiguous) in place, and gives their norm for a linear layer."""

    def exact_norm(self, streams: torch.Tensor, norm: Norm) -> torch.Tensor:
        """The norm of float32 streams in float32, for what is no linear layer."""

    def rope(self, heads: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor], scale: float) -> torch.Tensor:
        """Rotated heads [S, N, H, D], times `scale`, float32."""

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The gated product of [S, N, I] and [S, N, I]."""

    def linear(self, streams: torch.Tensor, module: nn.Linear) -> torch.Tensor:
        """[S, N, in] to [S, N, out] in the weight's dtype."""


class TorchOperations:
    """On any device."""

    def __init__(self, decoder: Decoder, rule: Rule):
        self._activation = decoder.activation
        self._rule = rule

    def norm(self, streams: torch.Tensor, norm: Norm, added: torch.Tensor | None = None) -> torch.Tensor:
        if added is not None:
            streams += added
        return self.exact_norm(streams, norm)

    def exact_norm(self, streams: torch.Tensor, norm: Norm) -> torch.Tensor:
        return rms_norm(streams, norm.gain, norm.eps, self._rule)

    def rope(self, heads: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor], scale: float) -> torch.Tensor:
        return rope(heads.float(), *table) * scale

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return gated(gate.float(), up.float(), self._activation, self._rule)

    def linear(self, streams: torch.Tensor, module: nn.Linear) -> torch.Tensor:
        return linear(streams, module.weight, module.bias)


class FusedOperations(TorchOperations):
    """By the kernels of a device: `kernels` is `agd_vllm.kernels.streams` or its like for a GPU."""

    def __init__(self, decoder: Decoder, rule: Rule, kernels: ModuleType):
        super().__init__(decoder, rule)
        self._kernels = kernels
        self._dtype = decoder.layers[0].q.weight.dtype

    def norm(self, streams: torch.Tensor, norm: Norm, added: torch.Tensor | None = None) -> torch.Tensor:
        return self._rms_norm(streams, added, norm, self._dtype)

    def exact_norm(self, streams: torch.Tensor, norm: Norm) -> torch.Tensor:
        return self._rms_norm(streams, None, norm, torch.float32)

    def rope(self, heads: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor], scale: float) -> torch.Tensor:
        return self._kernels.rope(heads, *table, scale)

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self._kernels.gated(gate, up, self._activation.name, self._rule.name)

    def _rms_norm(
        self, streams: torch.Tensor, added: torch.Tensor | None, norm: Norm, dtype: torch.dtype
    ) -> torch.Tensor:
        return self._kernels.rms_norm(streams, added, norm.gain, norm.eps, self._rule.through_norm, dtype)


class PackedOperations(FusedOperations):
    """On a CPU with a compiler. Takes the weights of the linear layers over: the modules keep none."""

    def __init__(self, decoder: Decoder, rule: Rule):
        super().__init__(decoder, rule, streams)
        self._packed = {}
        for layer in decoder.layers:
            for module in _linears(layer):
                self._packed[module] = torch.ops.mkldnn._reorder_linear_weight(module.weight, PACKED_FOR_ROWS)
                module.weight = None

    def linear(self, streams: torch.Tensor, module: nn.Linear) -> torch.Tensor:
        rows = streams.flatten(0, 1).to(self._dtype)
        out = torch.ops.mkldnn._linear_pointwise(rows, self._packed[module], None, "none", [], "")
        out = out.unflatten(0, streams.shape[:2])
        if module.bias is not None:
            out[0] += module.bias
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


def _linears(layer: Layer) -> list[nn.Linear]:
    return [layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down]
