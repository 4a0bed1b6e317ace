"""Attention of values and tangents by Triton's kernel against its twin in PyTorch."""

import pytest
import torch
from cached_batch import batch, copies, same_caches
from hypothesis import given, settings
from hypothesis import strategies as st

from agd_vllm.attribution.rules import RULES
from agd_vllm.attribution.sequence_attention import SequenceAttention
from agd_vllm.kernels import dual_attention
from agd_vllm.kernels.dual_attention import DualAttention, Tiling

PREFILL, DECODE = dual_attention.PREFILL, dual_attention.DECODE


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that a few dozen tokens are several tiles of queries and of keys."""
    monkeypatch.setattr(dual_attention, "PREFILL", (Tiling(32, 16, 4, 1),))
    monkeypatch.setattr(dual_attention, "DECODE", (Tiling(16, 16, 4, 1),))


def triton(segments, rule):
    caches = [(sequence.keys, sequence.values, sequence.length, count) for sequence, count in segments]
    return DualAttention(caches, RULES[rule].scores, RULES[rule].values)


def assert_equal(rule, segments, queries, keys, values, window=None, tolerance=1e-5):
    twins = copies(segments, torch.float32)
    ours = triton(segments, rule)(1, queries, keys, values, window)
    theirs = SequenceAttention(twins, RULES[rule])(1, queries, keys, values, window)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))
    assert same_caches(segments, twins)


@settings(max_examples=8, deadline=None)
@given(
    rule=st.sampled_from(list(RULES)),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([16, 64, 96]),
    tangents=st.integers(1, 2),
    sequences=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30)), min_size=1, max_size=3),
    window=st.none() | st.integers(1, 50),
    seed=st.integers(0, 2**16),
)
def test_it_equals_its_twin(rule, kv_heads, group, head_dim, tangents, sequences, window, seed):
    torch.manual_seed(seed)
    assert_equal(rule, *batch(rule, kv_heads, group, head_dim, tangents, sequences), window)


@settings(max_examples=4, deadline=None)
@given(
    rule=st.sampled_from(list(RULES)),
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=3),
    count=st.sampled_from([1, 9]),
    window=st.none() | st.integers(20, 90),
    splits=st.integers(2, 5),
    seed=st.integers(0, 2**16),
)
def test_programs_may_share_the_keys_of_a_tile(rule, lengths, count, window, splits, seed):
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dual_attention, "num_splits", lambda *_: splits)
        assert_equal(rule, *batch(rule, 2, 3, 64, 1, [(length, count) for length in lengths]), window)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_the_tiles_of_a_gpu(monkeypatch, head_dim):
    monkeypatch.setattr(dual_attention, "PREFILL", PREFILL)
    monkeypatch.setattr(dual_attention, "DECODE", DECODE)
    torch.manual_seed(head_dim)
    assert_equal("attnlrp", *batch("attnlrp", 1, 4, head_dim, 1, [(130, 1), (20, 50)]))


@pytest.mark.parametrize(("rule", "window"), [("attnlrp", None), ("cplrp", 20), ("ixg", 20)])
def test_bfloat16_caches(rule, window):
    """Weights are rounded to bfloat16 for the products, as the twin does (the interpreter cuts them off); against the
    twin in float32, from which the one in bfloat16 is off by as much."""
    torch.manual_seed(0)
    segments, queries, keys, values = batch(rule, 2, 3, 64, 2, [(70, 3), (0, 40), (77, 1)], torch.bfloat16)
    queries, keys = (tensor.bfloat16().float() for tensor in (queries, keys))
    assert_equal(rule, segments, queries, keys, values.bfloat16(), window, tolerance=2**-5)


def test_more_heads_in_a_group_than_rows_in_a_tile():
    torch.manual_seed(0)
    assert_equal("attnlrp", *batch("attnlrp", 1, 20, 16, 1, [(40, 1), (3, 4)]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_visible(bad):
    segments, queries, keys, values = batch("attnlrp", 1, 1, 64, 1, [(20, 1), (20, 1)])
    segments[0][0].keys[0, 0, 0, 3] = bad
    out = triton(segments, "attnlrp")(0, queries, keys, values, None)
    assert out[:, 0].isnan().any() and out[:, 1].isfinite().all()


def test_scores_of_any_size_are_safe():
    """At a score of some ten thousand float32 itself leaves an error of a thousandth in its exponential."""
    torch.manual_seed(0)
    segments, queries, keys, values = batch("attnlrp", 1, 1, 64, 1, [(50, 1)])
    assert_equal("attnlrp", segments, queries * 1e4, keys, values, tolerance=1e-2)
