"""A repetition penalty where vLLM's sampler cannot apply it: to a contrast, and before a choice that comes first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from vllm.model_executor.layers.utils import apply_penalties


def penalize(logits: torch.Tensor, tokens: Sequence[torch.Tensor], penalties: Sequence[float]) -> torch.Tensor:
    """Divides positive logits of a row's `tokens`, and multiplies negative ones, by its penalty, in place.

    `logits` [rows, vocabulary]; `tokens` int64 [any], of prompt and output alike; as Transformers'
    RepetitionPenaltyLogitsProcessor, by vLLM's own function.
    """
    rows, vocabulary = logits.shape
    held = pad_sequence(list(tokens), batch_first=True, padding_value=vocabulary)
    none = logits.new_zeros(rows)
    factors = torch.tensor(penalties, dtype=logits.dtype, device=logits.device)
    return apply_penalties(logits, held, held.new_empty(rows, 0), none, none, factors)
