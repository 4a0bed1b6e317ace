"""What a region of interest means to a scorer: weights on token positions, and heads of each layer."""

from __future__ import annotations

import torch

from agd_vllm.records import Roi


def check_roi(roi: Roi, *, num_tokens: int, num_layers: int, num_heads: int) -> None:
    """Raise ValueError, in one line, if a span leaves the `num_tokens` tokens or a head does not exist."""
    for span in roi.spans:
        if not 0 <= span.start < span.end <= num_tokens:
            raise ValueError(f"region of interest [{span.start}, {span.end}) lies outside the {num_tokens} tokens")
    for layer, head in roi.heads:
        if not (0 <= layer < num_layers and 0 <= head < num_heads):
            raise ValueError(
                f"head [{layer}, {head}] does not exist: the model has {num_layers} layers of {num_heads} heads"
            )


def token_weights(roi: Roi, start: int, end: int) -> torch.Tensor:
    """Weights of the token positions [start, end), float32 [end - start]; overlapping spans add up."""
    weights = torch.zeros(end - start)
    for span in roi.spans:
        weights[max(span.start - start, 0) : max(span.end - start, 0)] += span.weight
    return weights


def heads_by_layer(roi: Roi) -> dict[int, list[int]]:
    """Layer to its heads in the region, in ascending order; a head named twice counts once."""
    layers: dict[int, list[int]] = {}
    for layer, head in sorted(set(roi.heads)):
        layers.setdefault(layer, []).append(head)
    return layers
