"""The gate's Triton kernel against its twin in PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agd_vllm.kernels import gate_triton
from agd_vllm.kernels.gate import gate_twin

INF = float("inf")


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    """So that a few hundred tokens are many tiles and several chunks."""
    if "real_tiles" not in request.fixturenames:
        monkeypatch.setattr(gate_triton, "TILE", 16)
        monkeypatch.setattr(gate_triton, "TILES", 4)


@pytest.fixture
def real_tiles():
    """The sizes that a GPU runs."""


def assert_equal(logits: torch.Tensor, rows, tau, top_k, min_prob, pause) -> list[int]:
    """Compares both on copies, strides and all; gives the number of candidates of each row."""
    count = len(rows)
    arguments = (
        torch.tensor(rows, dtype=torch.int32),
        torch.full((count,), tau),
        top_k,
        torch.full((count,), min_prob),
        None if pause is None else torch.tensor(pause, dtype=torch.int32),
    )
    wide = torch.cat((logits, torch.full((len(logits), 7), 9.0)), dim=1).to(logits.dtype)
    ours, theirs = wide.clone(), wide.clone()
    vocab = logits.shape[1]
    decision = gate_triton.gate(ours[:, :vocab], *arguments)
    expected = gate_twin(theirs[:, :vocab], *arguments)
    for name in ("entropy", "log_sum_exp", "candidate_probs"):
        one, other = getattr(decision, name), getattr(expected, name)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, equal_nan=True, msg=lambda m, name=name: name + m)
    for name in ("open", "candidate_ids", "candidate_count"):
        assert torch.equal(getattr(decision, name), getattr(expected, name)), name
    # What is written: PAUSE's logit of the gated rows, if any, and nothing beside.
    assert torch.equal(ours.float().nan_to_num(1.5), theirs.float().nan_to_num(1.5))
    return decision.candidate_count.tolist()


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 6),
    vocab=st.integers(2, 400),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([0.5, 4.0, 30.0]),
    coarse=st.booleans(),
    tau=st.sampled_from([0.0, 0.7, 1.734]),
    top_k=st.sampled_from([2, 5, 20, 64]),
    # Where a probability is the floor itself, both may round it to either side.
    min_prob=st.sampled_from([0.0, 0.0513, 0.0031]),
    pauses=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_it_equals_its_twin(batch, vocab, dtype, scale, coarse, tau, top_k, min_prob, pauses, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, vocab, generator=generator) * scale
    if coarse:
        logits = logits.round()  # many are equal: the lower id comes first
    rows = (torch.rand(batch, generator=generator) < 0.7).nonzero().flatten().tolist()
    pause = torch.randint(vocab, (len(rows),), generator=generator).tolist() if pauses else None
    assert_equal(logits.to(dtype), rows, tau, top_k, min_prob, pause)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_huge_and_equal_logits(dtype):
    torch.manual_seed(0)
    logits = torch.randn(6, 300) * 3
    logits[0, ::2] = -INF
    logits[1] = -INF
    logits[2] = 0.25
    logits[3, 4:] = -INF
    logits[4] *= 1e4 / logits[4].abs().max()
    logits[5, :290] = -INF
    counts = assert_equal(logits.to(dtype), range(6), 0.0, 8, 0.0, [1, 2, 3, 0, 5, 295])
    assert counts == [8, 0, 8, 3, 8, 8]


def test_equal_logits_come_in_the_order_of_their_ids():
    logits = torch.zeros(1, 100)
    logits[0, [70, 20, 50]] = 1.0
    decision = gate_triton.gate(
        logits, torch.tensor([0]), torch.zeros(1), 6, torch.zeros(1), torch.tensor([1], dtype=torch.int32)
    )
    assert decision.candidate_ids.tolist() == [[20, 50, 70, 0, 2, 3]]
    assert logits[0, 1] == torch.finfo(torch.float32).max


def test_not_a_number_never_opens_the_gate():
    logits = torch.randn(2, 100)
    logits[0, 40] = float("nan")
    assert assert_equal(logits, [0, 1], 0.0, 4, 0.0, [3, 3]) == [0, 4]


@pytest.mark.parametrize("vocab", [49152, 128256, 300001])
def test_real_vocabularies(real_tiles, vocab):
    torch.manual_seed(vocab)
    logits = (torch.randn(2, vocab) * 2).bfloat16()
    logits[1, vocab - 1] = logits[1].max()
    assert assert_equal(logits, [0, 1], 1.734, 64, 0.0, [7, vocab - 2]) == [64, 64]
