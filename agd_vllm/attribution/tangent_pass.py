"""The tangent pass: the next tokens of several cached sequences through the decoder, values and tangents together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from agd_vllm.attribution.adapters import Layer, Norm, adapt
from agd_vllm.attribution.hf_model import HFModel
from agd_vllm.attribution.rules import RULES, attention, gated, linear, rms_norm, rope
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


class TangentPass:
    """Pushes streams through the layers of `hf` by the rule of that name (attnlrp, cplrp or ixg).

    The linear layers see the tokens of all sequences side by side, [S, N, d]. Attention goes sequence by sequence, each
    over its own cache: padded to one call it is slower from about 256 tokens on, and needs the caches side by side.
    The residual stream, norms, softmax and gates are float32, linear layers take the weights' dtype, and attention and
    its cache `attention_dtype`.
    """

    def __init__(self, hf: HFModel, rule: str):
        self.hf = hf
        self.rule = RULES[rule]
        self.decoder = adapt(hf)
        self.key_tangents = self.rule.scores != 0
        # A CPU multiplies small bfloat16 batches slower than float32 ones; a GPU needs the memory more.
        self.attention_dtype = torch.float32 if hf.device.type == "cpu" else hf.unembedding.dtype

    def extend(self, segments: Sequence[tuple[CachedSequence, int]]) -> torch.Tensor:
        """Compute the next tokens of each sequence, for which there must be room, and add them to its cache.

        A segment is (sequence, count). All sequences have the same number of regions. Returns the streams of the last
        token of each segment after the final norm, float32 [S, segments, d].
        """
        streams = self._embed(segments)
        windows = {layer.window for layer in self.decoder.layers}
        blocks = {
            window: [self._blocks(sequence.length, count, window) for sequence, count in segments] for window in windows
        }
        tables = self._rope_tables(segments)
        for index, layer in enumerate(self.decoder.layers):
            normed = self._norm(streams, layer.attention_norm)
            out = self._attend(index, layer, normed, segments, blocks[layer.window], tables[layer.rope])
            streams += self._norm(out, layer.attention_output_norm)
            normed = self._norm(streams, layer.mlp_norm)
            gate, up = self._linear(normed, layer.gate), self._linear(normed, layer.up)
            out = self._linear(gated(gate.float(), up.float(), self.decoder.activation, self.rule), layer.down)
            streams += self._norm(out, layer.mlp_output_norm)
        ends, end = [], 0
        for sequence, count in segments:
            sequence.length += count
            end += count
            ends.append(end - 1)
        return self._norm(streams[:, ends], self.decoder.final_norm)

    def _embed(self, segments: Sequence[tuple[CachedSequence, int]]) -> torch.Tensor:
        """Streams [S, N, d] at the input: embeddings E, and m * E for each region."""
        tokens = [token for seq, count in segments for token in seq.tokens[seq.length : seq.length + count]]
        ids = torch.tensor(tokens, device=self.hf.device)
        weights = torch.cat([seq.weights(seq.length, seq.length + count) for seq, count in segments], dim=1)
        weights = torch.cat([torch.ones(1, len(tokens)), weights]).to(self.hf.device)
        return self.hf.stack.embed_tokens(ids).float() * weights[:, :, None]

    def _rope_tables(
        self, segments: Sequence[tuple[CachedSequence, int]]
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Rotary tables by name: cos and signed sin, float32 [N, 1, D], for the tokens' positions."""
        positions = torch.cat([torch.arange(seq.length, seq.length + count) for seq, count in segments])
        tables = {}
        for name in {layer.rope for layer in self.decoder.layers}:
            cos, sin = self.decoder.rotary(name, positions.to(self.hf.device))
            low, high = sin.chunk(2, dim=-1)
            tables[name] = cos[:, None], torch.cat((-low, high), dim=-1)[:, None]
        return tables

    def _blocks(self, length: int, count: int, window: int | None) -> list[Block]:
        """Blocks of queries for `count` tokens after `length` cached ones, each over the keys it can see."""
        heads, kv_heads, total = self.hf.num_heads, self.hf.num_kv_heads, length + count
        groups = [slice(None)]
        if self.hf.device.type == "cpu" and heads * count * total > TOGETHER_ELEMENTS:
            groups = [slice(head, head + 1) for head in range(kv_heads)]
        size = max(1, SCORE_ELEMENTS[self.hf.device.type] * len(groups) // (heads * total))
        blocks = []
        for start in range(0, count, size):
            end = min(start + size, count)
            first = max(0, length + start - window + 1) if window else 0
            positions = torch.arange(length + start, length + end, device=self.hf.device)
            keys = positions if window is None else torch.arange(first, length + end, device=self.hf.device)
            blocks.append(Block(start, end, first, length + end, groups, _hide(positions, keys, window)))
        return blocks

    def _attend(
        self,
        index: int,
        layer: Layer,
        normed: torch.Tensor,
        segments: Sequence[tuple[CachedSequence, int]],
        blocks: Sequence[Sequence[Block]],
        table: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Attention of one layer, output projection included: [S, N, d] to [S, N, d]; fills the layer's cache."""
        hf = self.hf
        # CP-LRP holds attention weights constant: queries and keys need no tangent.
        scored = normed if self.key_tangents else normed[:1]
        queries = self._heads(scored, layer.q, layer.q_norm, table) * layer.scaling
        keys = self._heads(scored, layer.k, layer.k_norm, table)
        values = self._linear(normed, layer.v).unflatten(-1, (hf.num_kv_heads, hf.head_dim))
        dtype = self.attention_dtype
        # Heads first, as the cache has them: queries [K, S, heads of the group, N, D], keys and values [K, S, N, D].
        queries = queries.to(dtype).unflatten(2, (hf.num_kv_heads, -1)).permute(2, 0, 3, 1, 4)
        keys, values = keys.to(dtype).permute(2, 0, 1, 3), values.to(dtype).permute(2, 0, 1, 3)
        num_streams, num_tokens = normed.shape[:2]
        out = normed.new_empty(num_streams, num_tokens, hf.num_heads, hf.head_dim, dtype=dtype)
        grouped = out.unflatten(2, (hf.num_kv_heads, -1)).permute(2, 0, 3, 1, 4)
        offset = 0
        for (sequence, count), sequence_blocks in zip(segments, blocks, strict=True):
            here = slice(offset, offset + count)
            cached = slice(sequence.length, sequence.length + count)
            sequence.keys[index, :, :, cached] = keys[:, :, here]
            sequence.values[index, :, :, cached] = values[:, :, here]
            for block in sequence_blocks:
                rows = slice(offset + block.start, offset + block.end)
                seen = slice(block.first, block.last)
                for group in block.groups:
                    attended = attention(
                        queries[group, :, :, rows].flatten(2, 3),
                        sequence.keys[index, group, :, seen],
                        sequence.values[index, group, :, seen],
                        block.hide,
                        self.rule,
                    )
                    grouped[group, :, :, rows] = attended.unflatten(2, (-1, block.end - block.start))
            for region, heads in enumerate(sequence.heads, start=1):
                # A head of the region is a component itself: o' += o (arXiv 2509.26307), nested heads each count.
                for head in heads.get(index, ()):
                    out[region, here, head] += out[0, here, head]
            offset += count
        return self._linear(out.flatten(2), layer.o)

    def _heads(
        self, normed: torch.Tensor, projection, norm: Norm | None, table: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Rotated queries or keys, float32 [S, N, H, D]."""
        heads = self._linear(normed, projection).unflatten(-1, (-1, self.hf.head_dim)).float()
        return rope(self._norm(heads, norm), *table)

    def _linear(self, streams: torch.Tensor, module: torch.nn.Linear) -> torch.Tensor:
        return linear(streams, module.weight, module.bias)

    def _norm(self, streams: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        return streams if norm is None else rms_norm(streams.float(), norm.gain, norm.eps, self.rule)


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
