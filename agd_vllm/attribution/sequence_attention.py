"""Attention of cached sequences and their tangents in PyTorch, one sequence after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from agd_vllm.attribution.rules import Rule, attention
from agd_vllm.attribution.tangent_cache import CachedSequence

SCORE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Attention scores of one stream that are held at once: what a CPU's cache holds, what fills a GPU."""

TOGETHER_ELEMENTS = 1 << 15
"""Up to this many scores a CPU attends with all heads in one call; beyond, one head at a time is faster."""


class Block(NamedTuple):
    """Queries [start, end) of a segment, the cached positions [first, last) that they see, and what to hide.

    `groups`: the key-value heads that attend together.
    """

    start: int
    end: int
    first: int
    last: int
    groups: list[slice]
    hide: Callable[[torch.Tensor], object]


class SequenceAttention:
    """One batch of segments (sequence, count of new tokens), by `rule`; each attends over its own cache.

    Padded to one call it is slower from about 256 tokens on, and needs the caches side by side.
    """

    def __init__(self, segments: Sequence[tuple[CachedSequence, int]], rule: Rule):
        self._segments = segments
        self._rule = rule
        self._device = segments[0][0].keys.device
        self._blocks_of: dict[int | None, list[list[Block]]] = {}

    def __call__(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        """One layer: adds the new keys (float32) and values (of any dtype) to the caches, in whose dtype it attends.

        queries [key streams, N, H, D] (scaled by 1 / sqrt(d)), keys [key streams, N, K, D], values [S, N, K, D];
        `window`: a query sees that many positions, its own included. Returns [S, N, H, D].
        """
        num_streams, num_tokens, kv_heads, head_dim = values.shape
        num_heads = queries.shape[2]
        dtype = self._segments[0][0].values.dtype
        queries, keys, values = queries.to(dtype), keys.to(dtype), values.to(dtype)
        if window not in self._blocks_of:
            self._blocks_of[window] = [
                self._blocks(sequence.length, count, window, num_heads, kv_heads) for sequence, count in self._segments
            ]
        # Heads first, as the cache has them: queries [K, S, heads of the group, N, D], keys and values [K, S, N, D].
        queries = queries.unflatten(2, (kv_heads, -1)).permute(2, 0, 3, 1, 4)
        keys, values = keys.permute(2, 0, 1, 3), values.permute(2, 0, 1, 3)
        out = values.new_empty(num_streams, num_tokens, num_heads, head_dim)
        grouped = out.unflatten(2, (kv_heads, -1)).permute(2, 0, 3, 1, 4)
        offset = 0
        for (sequence, count), blocks in zip(self._segments, self._blocks_of[window], strict=True):
            here = slice(offset, offset + count)
            cached = slice(sequence.length, sequence.length + count)
            sequence.keys[layer, :, :, cached] = keys[:, :, here]
            sequence.values[layer, :, :, cached] = values[:, :, here]
            for block in blocks:
                rows = slice(offset + block.start, offset + block.end)
                seen = slice(block.first, block.last)
                for group in block.groups:
                    attended = attention(
                        queries[group, :, :, rows].flatten(2, 3),
                        sequence.keys[layer, group, :, seen],
                        sequence.values[layer, group, :, seen],
                        block.hide,
                        self._rule,
                    )
                    grouped[group, :, :, rows] = attended.unflatten(2, (-1, block.end - block.start))
            offset += count
        return out

    def _blocks(self, length: int, count: int, window: int | None, heads: int, kv_heads: int) -> list[Block]:
        """Blocks of queries for `count` tokens after `length` cached ones, each over the keys it can see."""
        total = length + count
        groups = [slice(None)]
        if self._device.type == "cpu" and heads * count * total > TOGETHER_ELEMENTS:
            groups = [slice(head, head + 1) for head in range(kv_heads)]
        size = max(1, SCORE_ELEMENTS[self._device.type] * len(groups) // (heads * total))
        blocks = []
        for start in range(0, count, size):
            end = min(start + size, count)
            first = max(0, length + start - window + 1) if window else 0
            positions = torch.arange(length + start, length + end, device=self._device)
            keys = positions if window is None else torch.arange(first, length + end, device=self._device)
            blocks.append(Block(start, end, first, length + end, groups, _hide(positions, keys, window)))
        return blocks


def _hide(queries: torch.Tensor, keys: torch.Tensor, window: int | None) -> Callable[[torch.Tensor], object]:
    """What masks the scores [K, heads of the group * queries, keys] of these positions in place: causality and window.

    One query sees all the keys that its block spans. Without a window all queries see the keys before the first of
    them, so that only the columns from there on need a mask.
    """
    if len(queries) == 1:
        return lambda scores: None
    hidden = keys > queries[:, None]
    if window is not None:
        hidden |= keys <= queries[:, None] - window

    def hide(scores: torch.Tensor) -> None:
        scores.unflatten(1, (-1, len(queries)))[..., -hidden.shape[1] :].masked_fill_(hidden, float("-inf"))

    return hide
