"""The gate's arithmetic against a literal float64 computation, and its C kernel against the twin in PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agd_vllm.kernels.gate import entropy_and_log_sum_exp, gate, gate_compiled, gate_twin
from agd_vllm.kernels.gate_decision import GateDecision


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


def gate_of(logits: torch.Tensor, rows: list[int], tau: float, top_k: int, min_prob: float, pause) -> GateDecision:
    """One threshold for all of the gated rows; `pause` is one token, one for each of them or None."""
    count = len(rows)
    paused = None if pause is None else torch.tensor(pause).expand(count)
    return gate(
        logits,
        torch.tensor(rows, dtype=torch.long),
        torch.full((count,), tau),
        top_k,
        torch.full((count,), min_prob),
        paused,
    )


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 9),
    vocab=st.integers(6, 700),
    scale=st.sampled_from([0.1, 1.0, 5.0, 30.0]),
    tau=st.sampled_from([0.0, 0.5, 1.734, float("inf")]),
    min_prob=st.sampled_from([0.0, 0.05, 0.3]),
    seed=st.integers(0, 2**31),
)
def test_equals_the_literal_gate(batch, vocab, scale, tau, min_prob, seed):
    """The token that pauses is never a candidate, here the most probable one of the first row."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, vocab, generator=generator) * scale
    pause = int(logits[0].argmax())
    rows = (torch.rand(batch, generator=generator) < 0.7).nonzero().flatten().tolist()
    entropy, expected = literal(logits[rows], tau, 5, min_prob, pause)
    written = logits.clone()
    decision = gate_of(written, rows, tau, 5, min_prob, pause)
    torch.testing.assert_close(decision.entropy.double(), entropy, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(decision.log_sum_exp, logits[rows].logsumexp(-1), atol=2e-5, rtol=1e-5)
    for at, candidates in enumerate(expected):
        # A probability or entropy on the very edge may fall on either side in float32.
        if abs(float(entropy[at]) - tau) < 1e-4:
            continue
        assert bool(decision.open[at]) == (candidates is not None)
        if candidates is None:
            continue
        count = int(decision.candidate_count[at])
        assert decision.candidate_ids[at].tolist() == [token for token, _ in candidates] + [-1] * (5 - count)
        assert decision.candidate_probs[at, :count].tolist() == pytest.approx([p for _, p in candidates], rel=1e-4)
    # Nothing but PAUSE's logit of the gated rows is written.
    highest = torch.finfo(torch.float32).max
    logits[rows, pause] = torch.where(decision.open, highest, -float("inf"))
    assert torch.equal(written, logits)


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 6),
    vocab=st.integers(2, 3000),
    scale=st.sampled_from([0.5, 4.0, 30.0]),
    coarse=st.booleans(),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
    tau=st.sampled_from([0.0, 0.7, 1.734]),
    top_k=st.sampled_from([2, 5, 64]),
    # Where a probability is the floor itself, both may round it to either side.
    min_prob=st.sampled_from([0.0, 0.0513, 0.0031]),
    pauses=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_c_kernel_equals_its_twin(batch, vocab, scale, coarse, masked, tau, top_k, min_prob, pauses, seed):
    """The rows lie further apart than they are long."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(batch, vocab + 7, generator=generator) * scale
    if coarse:
        wide = wide.round()  # many are equal: the lower id comes first
    wide[0, torch.rand(vocab + 7, generator=generator) < masked] = -float("inf")
    wide[-1, 0] = float("nan") if seed % 4 == 0 else 1.0
    ours, theirs = wide.clone(), wide.clone()
    rows = (torch.rand(batch, generator=generator) < 0.7).nonzero().flatten()
    count = len(rows)
    pause = torch.randint(vocab, (count,), generator=generator, dtype=torch.int32) if pauses else None
    arguments = rows, torch.full((count,), tau), top_k, torch.full((count,), min_prob), pause
    decision = gate_compiled(ours[:, :vocab], *arguments)
    expected = gate_twin(theirs[:, :vocab], *arguments)
    for name in ("entropy", "log_sum_exp", "candidate_probs"):
        one, other = getattr(decision, name), getattr(expected, name)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, equal_nan=True)
    for name in ("open", "candidate_ids", "candidate_count"):
        assert torch.equal(getattr(decision, name), getattr(expected, name)), name
    assert torch.equal(ours.nan_to_num(1.5), theirs.nan_to_num(1.5))
    assert pauses or torch.equal(ours.nan_to_num(1.5), wide.nan_to_num(1.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_token_that_pauses_every_token_may_be_a_candidate(dtype):
    logits = torch.zeros(1, 600, dtype=dtype)
    logits[0, [500, 3]] = torch.tensor([6.0, 5.0], dtype=dtype)
    written = logits.clone()
    assert gate_of(written, [0], 0.0, 3, 0.0, None).candidate_ids.tolist() == [[500, 3, 0]]
    assert torch.equal(written, logits)


def test_real_vocabularies():
    torch.manual_seed(0)
    logits = torch.randn(3, 151936) * 2
    entropy, _ = literal(logits, 0.0, 5, 0.0)
    torch.testing.assert_close(gate_of(logits, [0, 1, 2], 9.0, 5, 0.0, 7).entropy.double(), entropy, atol=5e-6, rtol=0)


def test_among_equal_logits_the_lower_id_comes_first():
    """Twelve tokens share the place of the last two candidates; `topk` alone would take any of them."""
    logits = torch.zeros(2, 5000).bfloat16()
    logits[0, 4000::50] = 3.0
    logits[0, [17, 4321, 99]] = 4.0
    decision = gate_of(logits, [0, 1], 0.0, 5, 0.0, [4000, 1])
    assert decision.candidate_ids.tolist() == [[17, 99, 4321, 4050, 4100], [0, 2, 3, 4, 5]]


def test_a_gate_needs_two_candidates_and_a_distribution():
    """A sure row, one with a single possible token besides PAUSE, one of nothing but -inf."""
    inf = float("inf")
    logits = torch.tensor([[50.0, 0.0, 0.0, 0.0], [3.0, -inf, 3.0, -inf], [-inf] * 4, [1.0, 1.0, 0.0, -inf]])
    decision = gate_of(logits, [0, 1, 2, 3], 0.0, 8, 0.01, 2)
    assert decision.open.tolist() == [False, False, False, True]
    assert decision.candidate_count.tolist() == [1, 1, 0, 2]
    assert decision.candidate_ids[3].tolist() == [0, 1] + [-1] * 6
    assert decision.entropy[2].isnan()
    assert logits[:, 2].tolist() == [-inf, -inf, -inf, torch.finfo(torch.float32).max]


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
