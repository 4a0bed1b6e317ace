"""The paged attention of `agd_vllm.kernels.paged_attention` in PyTorch, one sequence after another, each
gathered from its pages: where no kernel serves. Of a batch, `lengths` and `counts` lie on the host."""

from __future__ import annotations

import torch

from agd_vllm.attribution.rules import Rule, attention, rms_norm, rope
from agd_vllm.kernels.paged_attention import PagedBatch, PagedLayer, check_call

SCORE_ELEMENTS = 1 << 22
"""Attention scores of one stream that are held at once."""


def attend(layer: PagedLayer, batch: PagedBatch, index: int, cache: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
    """As `agd_vllm.kernels.paged_attention.attend`."""
    check_call(layer, batch, cache, qkv)
    rule = Rule("", layer.score_factor, layer.value_factor, layer.through_norm, gate=None)
    num_rows, streams = len(batch.slots), layer.planes - 2
    heads = qkv.view(2, num_rows, -1, layer.head_dim).float()
    queries, keys, values = heads.split([layer.num_heads, layer.num_kv_heads, layer.num_kv_heads], 2)
    cos, sin = (half.repeat(1, 2)[:, None] for half in layer.rope[batch.positions].chunk(2, -1))
    sin[..., : layer.head_dim // 2].neg_()

    def rotated(heads: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
        normed = heads[:streams] if gain is None else rms_norm(heads[:streams], gain, layer.eps, rule)
        return rope(normed, cos, sin)

    queries = rotated(queries, layer.query_gain) * layer.scale
    _append(cache, batch.slots, torch.cat((rotated(keys, layer.key_gain), values)))
    out = queries.new_zeros(2, num_rows, layer.num_heads, layer.head_dim)
    row = 0
    for blocks, length, count in zip(batch.block_table, batch.lengths.tolist(), batch.counts.tolist(), strict=True):
        end, block_size = length + count, cache.shape[3]
        # [K, planes, L, D] of one sequence.
        cached = cache[blocks[: -(-end // block_size)].long()].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :end].float()
        size = max(1, SCORE_ELEMENTS // (layer.num_heads * max(end, 1)))
        for start in range(0, count, size):
            rows = slice(row + start, row + min(start + size, count))
            positions = torch.arange(length + start, length + min(start + size, count), device=cache.device)
            out[:, rows] = _attend(queries[:, rows], cached[:, :, : int(positions[-1]) + 1], positions, layer, rule)
        row += count
    if batch.heads is not None:
        out[1] += batch.heads[index][..., None] * out[0]
    return out.view(2 * num_rows, -1).to(qkv.dtype)


def _append(cache: torch.Tensor, slots: torch.Tensor, planes: torch.Tensor) -> None:
    """Planes [planes, N, K, D] of new tokens to their places."""
    kept = slots >= 0
    slots, planes = slots[kept], planes[:, kept]
    block_size = cache.shape[3]
    cache[slots // block_size, :, :, slots % block_size] = planes.permute(1, 2, 0, 3).to(cache.dtype)


def _attend(
    queries: torch.Tensor, cached: torch.Tensor, positions: torch.Tensor, layer: PagedLayer, rule: Rule
) -> torch.Tensor:
    """Queries [streams, n, H, D] at `positions` to [2, n, H, D]; cached [K, planes, L, D]."""
    streams, first = len(queries), max(0, int(positions[0]) + 1 - layer.window) if layer.window else 0
    seen = torch.arange(first, cached.shape[2], device=cached.device)
    hidden = seen > positions[:, None]
    if layer.window:
        hidden |= seen <= positions[:, None] - layer.window

    def hide(scores: torch.Tensor) -> None:
        scores.unflatten(1, (-1, len(positions))).masked_fill_(hidden, float("-inf"))

    # Heads first: [K, streams, heads of the group * n, D].
    grouped = queries.unflatten(2, (layer.num_kv_heads, -1)).permute(2, 0, 3, 1, 4).flatten(2, 3)
    attended = attention(grouped, cached[:, :streams, first:], cached[:, streams:, first:], hide, rule)
    return attended.unflatten(2, (-1, len(positions))).permute(1, 3, 0, 2, 4).flatten(2, 3)
