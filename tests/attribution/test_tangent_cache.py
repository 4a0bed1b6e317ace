"""The tangent cache's own promises: who shares a prefix, who is evicted, what a forgotten tail leaves behind."""

import random

import pytest
import torch

from agd_vllm.attribution.tangent_cache import (
    PREFIX_BLOCK,
    CachedSequence,
    CacheShape,
    TangentCache,
    prefix_digests,
)
from agd_vllm.records import Roi, Span

SHAPE = CacheShape(
    num_layers=2, num_kv_heads=1, head_dim=4, key_tangents=True, dtype=torch.float32, device=torch.device("cpu")
)
ROI = Roi((Span(0, 4),))
TOKENS = [random.Random(1).randrange(100) for _ in range(5 * PREFIX_BLOCK + 3)]


def filled(cache: TangentCache, name: str, tokens: list[int], roi=ROI) -> CachedSequence:
    sequence = CachedSequence(SHAPE, roi, tokens=list(tokens))
    cache.add(name, sequence)
    cache.grow(sequence, len(tokens), [sequence])
    sequence.keys.fill_(len(cache)), sequence.values.fill_(len(cache))
    sequence.length = len(tokens)
    cache.index(sequence, prefix_digests(tokens, roi))
    return sequence


def shared(tokens: list[int], roi=ROI, other_tokens=TOKENS, other_roi=ROI) -> int:
    """Blocks of `tokens` that a sequence of `other_tokens` can give."""
    cache = TangentCache(SHAPE, 1 << 30)
    filled(cache, "donor", other_tokens, other_roi)
    return cache.donor(prefix_digests(tokens, roi))[1] // PREFIX_BLOCK


def test_the_longest_common_prefix_is_shared_in_whole_blocks():
    assert shared(TOKENS) == 5
    assert shared(TOKENS[: 2 * PREFIX_BLOCK + 5] + [101] * 60) == 2
    assert shared([101, *TOKENS[1:]]) == 0


@pytest.mark.parametrize("weights", [(1.0, 2.0), (-1.0, -2.0), (1.0, -1.0)])
def test_other_region_weights_on_the_prefix_share_nothing(weights):
    first, second = (Roi((Span(0, 4, weight),)) for weight in weights)
    assert shared(TOKENS, first, other_roi=first) == 5
    assert shared(TOKENS, second, other_roi=first) == 0


def test_a_region_shares_what_comes_before_the_difference():
    late = Roi((Span(0, 4), Span(3 * PREFIX_BLOCK + 1, 3 * PREFIX_BLOCK + 2)))
    assert shared(TOKENS, late) == 3


def test_other_heads_share_nothing():
    assert shared(TOKENS, Roi((Span(0, 4),), ((0, 0),))) == 0


def test_a_released_sequence_is_a_donor_until_room_is_needed():
    cache = TangentCache(SHAPE, 1 << 30)
    donor = filled(cache, "row", TOKENS)
    cache.release("row")
    assert cache.get("row") is None and len(cache) == 0
    assert cache.donor(prefix_digests(TOKENS, ROI)) == (donor, 5 * PREFIX_BLOCK)
    cache.evict(1 << 30)
    assert cache.donor(prefix_digests(TOKENS, ROI)) == (None, 0)
    assert cache.num_bytes == 0


def test_finished_sequences_go_first_then_the_least_recently_used():
    cache = TangentCache(SHAPE, 1 << 30)
    one = filled(cache, "old", TOKENS).num_bytes
    for name in ("used", "finished"):
        filled(cache, name, TOKENS)
    cache.release("finished")
    cache.get("old")
    cache.max_bytes = 2 * one
    cache.evict(0)
    assert cache.num_bytes == 2 * one and cache.get("used") and cache.get("old")
    cache.get("used"), cache.get("old")
    cache.evict(one)
    assert cache.get("used") is None and cache.get("old") is not None


def test_pinned_sequences_stay_even_beyond_the_budget():
    cache = TangentCache(SHAPE, 1)
    first = filled(cache, "first", TOKENS)
    second = CachedSequence(SHAPE, ROI, tokens=list(TOKENS))
    cache.add("second", second)
    cache.grow(second, len(TOKENS), [first, second])
    assert cache.get("first") is first and cache.num_bytes == first.num_bytes + second.num_bytes


def test_growing_keeps_what_is_computed():
    cache = TangentCache(SHAPE, 1 << 30)
    sequence = filled(cache, "row", TOKENS)
    sequence.keys.copy_(torch.randn_like(sequence.keys))
    before = sequence.keys[:, :, :, : len(TOKENS)].clone()
    cache.grow(sequence, 4 * sequence.capacity, [sequence])
    assert torch.equal(sequence.keys[:, :, :, : len(TOKENS)], before)
    assert cache.num_bytes == sequence.num_bytes == sequence.keys.nbytes + sequence.values.nbytes


def test_a_truncated_sequence_no_longer_offers_its_tail():
    cache = TangentCache(SHAPE, 1 << 30)
    sequence = filled(cache, "row", TOKENS)
    cache.truncate(sequence, 2 * PREFIX_BLOCK + 1)
    assert cache.donor(prefix_digests(TOKENS, ROI)) == (sequence, 2 * PREFIX_BLOCK)
    assert sequence.length == 2 * PREFIX_BLOCK + 1
