"""Random cached sequences with their next queries, keys and values: what kernels of attention are compared on."""

from dataclasses import replace

import torch

from agd_vllm.attribution.rules import RULES
from agd_vllm.attribution.tangent_cache import CachedSequence, CacheShape
from agd_vllm.records import Roi

LAYERS = 2


def batch(rule, kv_heads, group, head_dim, tangents, sequences, dtype=torch.float32, device="cpu"):
    """Caches of these (length, count) with random content up to each length, and the queries, keys and values of the
    new tokens."""
    shape = CacheShape(LAYERS, kv_heads, head_dim, RULES[rule].scores != 0, dtype, torch.device(device))
    rows, streams = sum(count for _, count in sequences), 1 + tangents
    key_streams = streams if shape.key_tangents else 1

    def cache(streams: int, length: int, count: int) -> torch.Tensor:
        # What lies beyond the length must never be read.
        size = (LAYERS, kv_heads, streams, length + count, head_dim)
        held = torch.full(size, float("nan"), dtype=dtype, device=device)
        held[:, :, :, :length].normal_()
        return held

    segments = []
    for length, count in sequences:
        keys, values = cache(key_streams, length, count), cache(streams, length, count)
        segments.append((CachedSequence(shape, Roi(), length=length, keys=keys, values=values), count))

    def random(streams: int, heads: int) -> torch.Tensor:
        return torch.randn(streams, rows, heads, head_dim, device=device)

    queries = random(key_streams, kv_heads * group) * head_dim**-0.5 * 3
    return segments, queries, random(key_streams, kv_heads), random(streams, kv_heads)


def copies(segments, dtype=None):
    """The same sequences with caches of their own, in `dtype` if given."""
    twins = []
    for sequence, count in segments:
        shape = replace(sequence.shape, dtype=dtype or sequence.shape.dtype)
        twin = replace(sequence, shape=shape, keys=sequence.keys.to(shape.dtype, copy=True))
        twin.values = sequence.values.to(shape.dtype, copy=True)
        twins.append((twin, count))
    return twins


def same_caches(segments, twins) -> bool:
    """Whether the caches hold the same numbers, and NaN at the same places."""
    return all(
        torch.equal(one.float().nan_to_num(9), other.float().nan_to_num(9))
        for (sequence, _), (twin, _) in zip(segments, twins, strict=True)
        for one, other in ((sequence.keys, twin.keys), (sequence.values, twin.values))
    )
