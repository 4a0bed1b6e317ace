"""The AGD gate over a batch of next-token logits: entropy, candidates, decision (arXiv 2509.26307, section 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch

# Rows per pass: a few rows of a 50k to 150k vocabulary stay in a core's cache, a whole batch does not.
ROWS_PER_PASS = 4


class GateDecision(NamedTuple):
    """`entropy` [rows] in nats, `gated` [gated] row indices in ascending order, and for those rows
    `candidate_ids` and `candidate_probs` [gated, top_k] by descending probability, of which the first
    `candidate_count` [gated] are candidates."""

    entropy: torch.Tensor
    gated: torch.Tensor
    candidate_ids: torch.Tensor
    candidate_probs: torch.Tensor
    candidate_count: torch.Tensor


def entropy_and_log_sum_exp(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy (nats) and log-sum-exp of each row's softmax, both [rows] float32, in float32 throughout.

    `logits` [rows, vocab], any floating dtype; -inf is allowed, a row of nothing but -inf gives NaN.
    With z = x - max and s = sum(exp z):  H = log s - sum(z exp z) / s.
    """
    entropies, log_sums = [], []
    for rows in logits.split(ROWS_PER_PASS):
        top = rows.amax(-1, keepdim=True).float()
        z = rows.float() - top
        e = z.exp()
        total = e.sum(-1)
        # exp(-1e4) is 0 in float32: the clamp changes nothing but 0 * -inf, which would be NaN.
        weighted = z.clamp_(min=-1e4).mul_(e).sum(-1)
        log_total = total.log()
        entropies.append(log_total - weighted / total)
        log_sums.append(top.squeeze(-1) + log_total)
    return torch.cat(entropies), torch.cat(log_sums)


def gate(
    logits: torch.Tensor, tau: torch.Tensor, top_k: int, min_prob: torch.Tensor, pause: torch.Tensor
) -> GateDecision:
    """Opens for the rows whose entropy is at least `tau` and that have at least two candidates.

    Candidates are the `top_k` most probable tokens with probability >= `min_prob`, `pause` never among them; entropy
    and probabilities are those of the full distribution. `logits` [rows, vocab]; `tau` (nats) and `min_prob` [rows]
    float32; `pause` [rows] token ids.
    """
    entropy, log_sum_exp = entropy_and_log_sum_exp(logits)
    uncertain = (entropy >= tau).nonzero().squeeze(-1)
    choices = logits[uncertain].float().scatter_(1, pause[uncertain, None], float("-inf"))
    values, ids = choices.topk(min(top_k, logits.shape[-1]), dim=-1)
    probs = (values - log_sum_exp[uncertain, None]).exp()
    # A floor of 0 lets in what is improbable, not what is impossible.
    count = ((probs >= min_prob[uncertain, None]) & (values > float("-inf"))).sum(-1)
    enough = count >= 2
    return GateDecision(entropy, uncertain[enough], ids[enough], probs[enough], count[enough])
