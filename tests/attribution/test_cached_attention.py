"""The compiled attention of a CPU against its twin in PyTorch."""

import pytest
import torch
from cached_batch import batch, copies, same_caches
from hypothesis import given, settings
from hypothesis import strategies as st

from agd_vllm.attribution.rules import RULES
from agd_vllm.attribution.sequence_attention import SequenceAttention
from agd_vllm.kernels import cached_attention


def compiled(segments, rule):
    caches = [(sequence.keys, sequence.values, sequence.length, count) for sequence, count in segments]
    return cached_attention.CachedAttention(caches, RULES[rule].scores, RULES[rule].values)


@settings(max_examples=60, deadline=None)
@given(
    rule=st.sampled_from(list(RULES)),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from(cached_attention.HEAD_DIMS),
    tangents=st.integers(1, 3),
    sequences=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 40)), min_size=1, max_size=4),
    window=st.none() | st.integers(1, 60),
    seed=st.integers(0, 2**16),
)
def test_it_attends_and_fills_the_caches_as_its_twin(
    rule, kv_heads, group, head_dim, tangents, sequences, window, seed
):
    torch.manual_seed(seed)
    segments, queries, keys, values = batch(rule, kv_heads, group, head_dim, tangents, sequences)
    twins = copies(segments)
    ours = compiled(segments, rule)(1, queries, keys, values, window)
    theirs = SequenceAttention(twins, RULES[rule])(1, queries, keys, values, window)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    assert same_caches(segments, twins)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("rule", list(RULES))
def test_bfloat16_caches_are_read_and_filled(rule, window):
    """The twin rounds everything in between, too, so it gets what the caches hold in float32."""
    torch.manual_seed(0)
    segments, queries, keys, values = batch(rule, 3, 2, 64, 2, [(100, 3), (0, 40), (77, 1)], torch.bfloat16)
    in_float = copies(segments, torch.float32)
    ours = compiled(segments, rule)(1, queries, keys, values, window)
    rounded = keys.bfloat16().float(), values.bfloat16().float()
    theirs = SequenceAttention(in_float, RULES[rule])(1, queries, *rounded, window)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    assert same_caches(segments, in_float)


def test_a_sequence_gets_the_same_bits_whatever_is_beside_it():
    torch.manual_seed(0)
    segments, queries, keys, values = batch("attnlrp", 3, 3, 64, 1, [(200, 3), (17, 1), (64, 30)])
    together = compiled(segments, "attnlrp")(0, queries, keys, values, None)
    alone = compiled(segments[1:2], "attnlrp")(0, queries[:, 3:4], keys[:, 3:4], values[:, 3:4], None)
    assert torch.equal(alone, together[:, 3:4])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_visible(bad):
    segments, queries, keys, values = batch("attnlrp", 1, 1, 64, 1, [(20, 1), (20, 1)])
    segments[0][0].keys[0, 0, 0, 3] = bad
    out = compiled(segments, "attnlrp")(0, queries, keys, values, None)
    assert out[:, 0].isnan().any() and out[:, 1].isfinite().all()


def test_scores_of_any_size_are_safe():
    segments, queries, keys, values = batch("attnlrp", 1, 1, 64, 1, [(50, 1)])
    ours = compiled(segments, "attnlrp")(0, queries * 1e4, keys, values, None)
    theirs = SequenceAttention(segments, RULES["attnlrp"])(0, queries * 1e4, keys, values, None)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
