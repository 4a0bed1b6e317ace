"""Random cached sequences with their next queries, keys and values: what kernels of attention are compared on."""

from dataclasses import replace

import torch

from agd_vllm.attribution.rules import RULES
from agd_vllm.attribution.tangent_cache import CachedSequence, CacheShape
from agd_vllm.records import Roi, Span

LAYERS = 2


def batch(rule, kv_heads, group, head_dim, regions, sequences, dtype=torch.float32, device="cpu"):
    """Caches of these (length, count) with random content up to each length, and the queries, keys and values of the
    new tokens."""
    shape = CacheShape(LAYERS, kv_heads, head_dim, RULES[rule].scores != 0, dtype, torch.device(device))
    segments = []
    for length, count in sequences:
        sequence = CachedSequence(shape, (Roi((Span(0, 1),)),) * regions)
        sequence.reserve(length + count)
        # What lies beyond the length must never be read.
        sequence.keys.fill_(float("nan"))
        sequence.values.fill_(float("nan"))
        sequence.keys[:, :, :, :length].normal_()
        sequence.values[:, :, :, :length].normal_()
        sequence.length = length
        segments.append((sequence, count))
    rows, streams = sum(count for _, count in sequences), 1 + regions
    key_streams = segments[0][0].keys.shape[2]

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
