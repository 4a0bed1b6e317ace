"""The tangent cache's own promises: who shares a prefix, who is evicted, what a forgotten tail leaves behind."""

import random

import pytest
import torch

from agd_vllm.attribution.block_pool import BLOCK_TOKENS, CacheShape, blocks_for
from agd_vllm.attribution.tangent_cache import CachedSequence, TangentCache, prefix_digests
from agd_vllm.records import Roi, Span

SHAPE = CacheShape(
    num_layers=2, num_kv_heads=1, head_dim=4, key_tangents=True, dtype=torch.float32, device=torch.device("cpu")
)
ROI = Roi((Span(0, 4),))
TOKENS = [random.Random(1).randrange(100) for _ in range(5 * BLOCK_TOKENS + 3)]
BLOCKS = blocks_for(len(TOKENS))


def cache_of(num_blocks: int) -> TangentCache:
    return TangentCache(SHAPE, num_blocks * SHAPE.block_bytes)


def filled(cache: TangentCache, name: str, tokens: list[int], roi=ROI) -> CachedSequence:
    sequence = CachedSequence(roi, tokens=list(tokens))
    cache.add(name, sequence)
    cache.grow(sequence, len(tokens), [sequence])
    cache.pool.layers[:, sequence.blocks] = torch.randn(2, len(sequence.blocks), 1, 4, BLOCK_TOKENS, 4)
    sequence.length = len(tokens)
    cache.index(sequence, prefix_digests(tokens, roi))
    return sequence


def content(cache: TangentCache, sequence: CachedSequence) -> torch.Tensor:
    """Of all computed tokens [layers, tokens, K, planes, D]."""
    return cache.pool.layers[:, sequence.blocks].movedim(4, 2).flatten(1, 2)[:, : sequence.length].clone()


def shared(tokens: list[int], roi=ROI, other_tokens=TOKENS, other_roi=ROI) -> int:
    """Blocks of `tokens` that a sequence of `other_tokens` can give."""
    cache = cache_of(BLOCKS)
    filled(cache, "donor", other_tokens, other_roi)
    return cache.donor(prefix_digests(tokens, roi))[1] // BLOCK_TOKENS


def test_the_longest_common_prefix_is_shared_in_whole_blocks():
    assert shared(TOKENS) == 5
    assert shared(TOKENS[: 2 * BLOCK_TOKENS + 5] + [101] * 60) == 2
    assert shared([101, *TOKENS[1:]]) == 0


@pytest.mark.parametrize("weights", [(1.0, 2.0), (-1.0, -2.0), (1.0, -1.0)])
def test_other_region_weights_on_the_prefix_share_nothing(weights):
    first, second = (Roi((Span(0, 4, weight),)) for weight in weights)
    assert shared(TOKENS, first, other_roi=first) == 5
    assert shared(TOKENS, second, other_roi=first) == 0


def test_a_region_shares_what_comes_before_the_difference():
    late = Roi((Span(0, 4), Span(3 * BLOCK_TOKENS + 1, 3 * BLOCK_TOKENS + 2)))
    assert shared(TOKENS, late) == 3


def test_other_heads_share_nothing():
    assert shared(TOKENS, Roi((Span(0, 4),), ((0, 0),))) == 0


def test_a_released_sequence_is_a_donor_until_room_is_needed():
    cache = cache_of(BLOCKS)
    donor = filled(cache, "row", TOKENS)
    cache.release("row")
    assert cache.get("row") is None and len(cache) == 0
    assert cache.donor(prefix_digests(TOKENS, ROI)) == (donor, 5 * BLOCK_TOKENS)
    cache.evict(1)
    assert cache.donor(prefix_digests(TOKENS, ROI)) == (None, 0)
    assert cache.num_bytes == 0


def test_finished_sequences_go_first_then_the_least_recently_used():
    cache = cache_of(3 * BLOCKS)
    for name in ("old", "used", "finished"):
        filled(cache, name, TOKENS)
    cache.release("finished")
    cache.get("old")
    cache.evict(BLOCKS)
    assert cache.num_bytes == 2 * BLOCKS * SHAPE.block_bytes and cache.get("used") and cache.get("old")
    cache.get("used"), cache.get("old")
    cache.evict(BLOCKS + 1)
    assert cache.get("used") is None and cache.get("old") is not None


def test_pinned_sequences_stay_and_room_that_is_not_there_is_an_error():
    cache = cache_of(2 * BLOCKS - 1)
    first = filled(cache, "first", TOKENS)
    second = CachedSequence(ROI, tokens=list(TOKENS))
    cache.add("second", second)
    with pytest.raises(MemoryError, match=f"{BLOCKS} blocks"):
        cache.grow(second, len(TOKENS), [first, second])
    assert cache.get("first") is first and len(second.blocks) == 0
    cache.grow(second, len(TOKENS), [second])
    assert cache.get("first") is None and len(second.blocks) == BLOCKS


def test_growing_moves_nothing():
    cache = cache_of(4 * BLOCKS)
    sequence = filled(cache, "row", TOKENS)
    before, blocks = content(cache, sequence), sequence.blocks
    cache.grow(sequence, 3 * len(TOKENS), [sequence])
    assert sequence.blocks[:BLOCKS].tolist() == blocks.tolist()
    assert torch.equal(content(cache, sequence), before)
    assert cache.num_bytes == len(sequence.blocks) * SHAPE.block_bytes


def test_a_shared_prefix_takes_no_blocks_and_outlives_its_donor():
    cache = cache_of(2 * BLOCKS)
    donor = filled(cache, "donor", TOKENS)
    before, held = content(cache, donor), cache.num_bytes
    other = CachedSequence(ROI, tokens=list(TOKENS))
    cache.share(other, donor, 5 * BLOCK_TOKENS)
    cache.add("other", other)
    assert cache.num_bytes == held
    cache.discard("donor")
    assert cache.num_bytes == 5 * SHAPE.block_bytes
    assert torch.equal(content(cache, other), before[:, : 5 * BLOCK_TOKENS])


def test_a_row_cut_back_inside_a_shared_block_copies_that_block_first():
    cache = cache_of(2 * BLOCKS)
    donor = filled(cache, "donor", TOKENS)
    before = content(cache, donor)
    other = CachedSequence(ROI, tokens=list(TOKENS))
    cache.share(other, donor, 5 * BLOCK_TOKENS)
    cache.add("other", other)
    cut = 4 * BLOCK_TOKENS + 7
    cache.truncate(donor, cut)
    cache.grow(donor, cut + 1, [donor, other])
    assert donor.blocks[:4].tolist() == other.blocks[:4].tolist() and donor.blocks[4] != other.blocks[4]
    assert torch.equal(content(cache, donor), before[:, :cut])
    cache.pool.layers[:, donor.blocks[4]] = 0
    assert torch.equal(content(cache, other), before[:, : 5 * BLOCK_TOKENS])


def test_a_truncated_sequence_no_longer_offers_its_tail():
    cache = cache_of(BLOCKS)
    sequence = filled(cache, "row", TOKENS)
    cache.truncate(sequence, 2 * BLOCK_TOKENS + 1)
    assert cache.donor(prefix_digests(TOKENS, ROI)) == (sequence, 2 * BLOCK_TOKENS)
    assert sequence.length == 2 * BLOCK_TOKENS + 1 and cache.num_bytes == 3 * SHAPE.block_bytes
