"""The gate's arithmetic against a literal float64 computation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agd_vllm.kernels.gate import entropy_and_log_sum_exp, gate


def literal(logits: torch.Tensor, tau: float, top_k: int, min_prob: float, pause: int = -1):
    probs = logits.double().softmax(-1)
    entropy = torch.special.entr(probs).sum(-1)
    decisions = []
    for row, h in zip(probs, entropy, strict=True):
        p, ids = row.topk(top_k + 1)
        likely = [(int(i), float(q)) for i, q in zip(ids, p, strict=True) if i != pause][:top_k]
        candidates = [(token, q) for token, q in likely if q >= min_prob]
        decisions.append(candidates if h >= tau and len(candidates) >= 2 else None)
    return entropy, decisions


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    vocab=st.integers(6, 700),
    scale=st.sampled_from([0.1, 1.0, 5.0, 30.0]),
    tau=st.sampled_from([0.0, 0.5, 1.734, float("inf")]),
    min_prob=st.sampled_from([0.0, 0.05, 0.3]),
    seed=st.integers(0, 2**31),
)
def test_equals_the_literal_gate(rows, vocab, scale, tau, min_prob, seed):
    """The token that pauses is never a candidate, here the most probable one of the first row."""
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale
    pause = int(logits[0].argmax())
    entropy, expected = literal(logits, tau, 5, min_prob, pause)
    decision = gate(
        logits, torch.full((rows,), tau), 5, torch.full((rows,), min_prob), torch.full((rows,), pause, dtype=torch.long)
    )
    torch.testing.assert_close(decision.entropy.double(), entropy, atol=2e-5, rtol=1e-5)
    opened = dict(zip(decision.gated.tolist(), range(rows), strict=False))
    for row, candidates in enumerate(expected):
        # A probability or entropy on the very edge may fall on either side in float32.
        if abs(float(entropy[row]) - tau) < 1e-4:
            continue
        assert (row in opened) == (candidates is not None)
        if candidates is None:
            continue
        at = opened[row]
        count = int(decision.candidate_count[at])
        assert decision.candidate_ids[at, :count].tolist() == [token for token, _ in candidates]
        assert decision.candidate_probs[at, :count].tolist() == pytest.approx([p for _, p in candidates], rel=1e-4)


def test_masked_and_huge_logits_are_safe():
    inf = float("inf")
    logits = torch.tensor([[1e4, -1e4, 0.0, -inf], [-inf, 2.0, 2.0, -inf], [7.0, 7.0, 7.0, 7.0]])
    entropy, log_sum_exp = entropy_and_log_sum_exp(logits)
    assert entropy.tolist() == pytest.approx([0.0, 0.6931472, 1.3862944], abs=1e-6)
    assert log_sum_exp.tolist() == pytest.approx([1e4, 2.6931472, 8.3862944])


def test_half_precision_logits_are_measured_in_float32():
    logits = torch.randn(3, 1000).bfloat16()
    expected, _ = literal(logits, 0.0, 5, 0.0)
    entropy, _ = entropy_and_log_sum_exp(logits)
    assert entropy.dtype == torch.float32
    torch.testing.assert_close(entropy.double(), expected, atol=1e-5, rtol=1e-5)
