"""DoLa's choice of a layer and of a token, from logits alone."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

# Below every kept token, whose score is at least log(relative_top * max q_N) > -REMOVED; among themselves removed
# tokens keep their order, for where all kept ones are forbidden (min_tokens).
REMOVED = 1000.0


def dola_scores(final: torch.Tensor, early: Iterable[torch.Tensor], relative_top: float) -> torch.Tensor:
    """What takes the place of the logits, [N, V] float32; each row is by itself (arXiv 2309.03883, eqs. 2 to 5).

    `final` [N, V]: logits q_N of the last layer; `early`: logits [N, V] of the candidate layers, in their order, taken
    one after the other. Of these the row's premature layer M is the one of the greatest divergence
    1/2 [KL(m || q_N) + KL(m || q_j)], m = (q_N + q_j) / 2, as the published implementations have it (the reverse of
    Jensen-Shannon's). Tokens of q_N >= relative_top * max q_N have log q_N - log q_M, the others are removed.
    """
    mature = final.float().log_softmax(-1)
    premature, greatest = torch.empty_like(mature), mature.new_full((len(mature), 1), -math.inf)
    for logits in early:
        layer = logits.float().log_softmax(-1)
        mixture = torch.logaddexp(mature, layer) - math.log(2)
        divergence = (mixture.exp() * (mixture - (mature + layer) / 2)).sum(-1, keepdim=True)
        farther = divergence > greatest
        premature = torch.where(farther, layer, premature)
        greatest = torch.where(farther, divergence, greatest)
    threshold = mature.amax(-1, keepdim=True) + (math.log(relative_top) if relative_top else -math.inf)
    return torch.where(mature >= threshold, mature - premature, mature - REMOVED)
