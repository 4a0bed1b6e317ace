"""The linear layers of the tangent pass: as PyTorch multiplies, or with weights that oneDNN has laid out anew."""

from __future__ import annotations

from collections.abc import Callable

import torch

from agd_vllm.attribution import rules
from agd_vllm.attribution.adapters import Decoder, Linear

PACKED_FOR_ROWS = 32
"""Rows of a product that oneDNN lays weights out for: a few guided steps. For more the same layout is good, too."""


def linears(decoder: Decoder) -> Callable[[torch.Tensor, Linear], torch.Tensor]:
    """What takes streams [S, N, in] through a layer, to [S, N, out] in the weight's dtype; the fastest there is.

    Where that is oneDNN, the decoder's weights are of no use to others any more.
    """
    if not _can_pack(decoder.layers[0].qkv.weight):
        return _plain
    for layer in decoder.layers:
        for each in (layer.qkv, layer.o, layer.gate_up, layer.down):
            each.weight = torch.ops.mkldnn._reorder_linear_weight(each.weight, PACKED_FOR_ROWS)
    return _packed


def _plain(streams: torch.Tensor, layer: Linear) -> torch.Tensor:
    return rules.linear(streams, layer.weight, layer.bias)


def _packed(streams: torch.Tensor, layer: Linear) -> torch.Tensor:
    rows = streams.flatten(0, 1).to(layer.weight.dtype)
    out = torch.ops.mkldnn._linear_pointwise(rows, layer.weight, None, "none", [], "")
    out = out.unflatten(0, streams.shape[:2])
    if layer.bias is not None:
        out[0] += layer.bias
    return out


def _can_pack(weight: torch.Tensor) -> bool:
    """oneDNN multiplies bfloat16 only on CPUs with instructions for it."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.float32:
        return True
    return weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
