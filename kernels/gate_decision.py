"""What the gate says of the rows of a batch, by whichever kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch


class GateDecision(NamedTuple):
    """One entry for each gated row, in their order, on the device of the logits.

    `entropy` [rows] in nats and `log_sum_exp` [rows], float32; `open` [rows] bool: the gate opens. `candidate_ids`
    (-1) and `candidate_probs` (0) [rows, top_k] by descending probability, the lower id first where they are equal;
    the first `candidate_count` [rows] are candidates, the rest is filled up. Rows below tau have none.
    """

    entropy: torch.Tensor
    log_sum_exp: torch.Tensor
    open: torch.Tensor
    candidate_ids: torch.Tensor
    candidate_probs: torch.Tensor
    candidate_count: torch.Tensor
