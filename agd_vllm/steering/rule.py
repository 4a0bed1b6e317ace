"""How a stream is steered."""

from __future__ import annotations

import torch


def steered(stream: torch.Tensor, offset: torch.Tensor, norm: bool) -> torch.Tensor:
    """h' = h + offset (strength times vector, [d]), in float32; with `norm` h'' = h' |h| / |h'|, of each token's
    features by themselves (arXiv 2507.18043, section 3.3). `stream` is [..., d] and keeps its length in every row."""
    before = stream.float()
    after = before + offset
    if norm:
        lengths = before.norm(dim=-1, keepdim=True), after.norm(dim=-1, keepdim=True)
        after = after * (lengths[0] / lengths[1].clamp_min(torch.finfo(torch.float32).tiny))
    return after
