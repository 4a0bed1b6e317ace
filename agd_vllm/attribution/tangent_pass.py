"""The tangent pass: the next tokens of several cached sequences through the decoder, values and tangents together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from agd_vllm.attribution.adapters import Layer, adapt
from agd_vllm.attribution.hf_model import HFModel
from agd_vllm.attribution.operations import operations
from agd_vllm.attribution.regions import token_weights
from agd_vllm.attribution.rules import RULES, Norm
from agd_vllm.attribution.sequence_attention import SequenceAttention
from agd_vllm.attribution.tangent_cache import CachedSequence
from agd_vllm.kernels import cached_attention, triton_support
from agd_vllm.kernels.to_device import to_device

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, int | None], torch.Tensor]
"""Layer, queries, keys, values and window to the layer's attention: see `SequenceAttention` and its faster twins."""


class TangentPass:
    """Pushes streams through the layers of `hf` by the rule of that name (attnlrp, cplrp or ixg).

    The linear layers see the tokens of all sequences side by side, [S, N, d]; in attention each sequence has its own
    cache.
    The residual stream, norms, softmax and gates are float32, linear layers take the weights' dtype, and the caches
    `cache_dtype`.
    """

    def __init__(self, hf: HFModel, rule: str):
        self.hf = hf
        self.rule = RULES[rule]
        self.decoder = adapt(hf)
        self.ops = operations(hf, self.decoder, self.rule)
        self.key_tangents = self.rule.scores != 0
        self.cache_dtype = hf.unembedding.dtype
        self._kernel = _attention_kernel(hf)
        if hf.device.type == "cpu" and self._kernel is None:
            # PyTorch multiplies small bfloat16 batches slower than float32 ones there.
            self.cache_dtype = torch.float32

    def extend(self, segments: Sequence[tuple[CachedSequence, int]]) -> torch.Tensor:
        """Compute the next tokens of each sequence, for which there must be room, and add them to its cache.

        A segment is (sequence, count). Returns the streams of the last token of each segment after the final norm,
        float32 [2, segments, d].
        """
        streams = self._embed(segments)
        attend = self._attention(segments)
        tables = self._rope_tables(segments)
        ends = to_device(torch.tensor([count for _, count in segments]).cumsum(0) - 1, self.hf.device)
        out = None
        for index, layer in enumerate(self.decoder.layers):
            normed = self.ops.norm(streams, layer.attention_norm, out)
            out = self._attend(index, layer, normed, segments, attend, tables[layer.rope])
            normed = self.ops.norm(streams, layer.mlp_norm, self._norm(out, layer.attention_output_norm))
            gate, up = self.ops.linear(normed, layer.gate), self.ops.linear(normed, layer.up)
            out = self.ops.linear(self.ops.gated(gate, up), layer.down)
            out = self._norm(out, layer.mlp_output_norm)
        for sequence, count in segments:
            sequence.length += count
        return self.ops.exact_norm(streams[:, ends] + out[:, ends], self.decoder.final_norm)

    def _embed(self, segments: Sequence[tuple[CachedSequence, int]]) -> torch.Tensor:
        """Streams [S, N, d] at the input: embeddings E, and m * E for the region."""
        tokens = [token for seq, count in segments for token in seq.tokens[seq.length : seq.length + count]]
        ids = to_device(torch.tensor(tokens), self.hf.device)
        weights = torch.cat([token_weights(seq.roi, seq.length, seq.length + count) for seq, count in segments])
        weights = to_device(torch.stack([torch.ones(len(tokens)), weights]), self.hf.device)
        return self.hf.stack.embed_tokens(ids).float() * weights[:, :, None]

    def _rope_tables(
        self, segments: Sequence[tuple[CachedSequence, int]]
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Rotary tables by name: cos and signed sin, float32 [N, 1, D], for the tokens' positions."""
        positions = torch.cat([torch.arange(seq.length, seq.length + count) for seq, count in segments])
        positions = to_device(positions, self.hf.device)
        tables = {}
        for name in {layer.rope for layer in self.decoder.layers}:
            cos, sin = self.decoder.rotary(name, positions)
            low, high = sin.chunk(2, dim=-1)
            tables[name] = cos[:, None], torch.cat((-low, high), dim=-1)[:, None]
        return tables

    def _attention(self, segments: Sequence[tuple[CachedSequence, int]]) -> Attend:
        rule = self.rule
        if self._kernel is None:
            return SequenceAttention(segments, rule)
        caches = [(sequence.keys, sequence.values, sequence.length, count) for sequence, count in segments]
        return self._kernel(caches, rule.scores, rule.values)

    def _attend(
        self,
        index: int,
        layer: Layer,
        normed: torch.Tensor,
        segments: Sequence[tuple[CachedSequence, int]],
        attend: Attend,
        table: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Attention of one layer, output projection included: [S, N, d] to [S, N, d]; fills the layer's cache."""
        hf = self.hf
        # CP-LRP holds attention weights constant: queries and keys need no tangent.
        scored = normed if self.key_tangents else normed[:1]
        queries = self._heads(scored, layer.q, layer.q_norm, table, layer.scaling)
        keys = self._heads(scored, layer.k, layer.k_norm, table, 1.0)
        values = self.ops.linear(normed, layer.v).unflatten(-1, (hf.num_kv_heads, hf.head_dim))
        out = attend(index, queries, keys, values, layer.window)
        offset = 0
        for sequence, count in segments:
            here = slice(offset, offset + count)
            # A head of the region is a component itself: o' += o (arXiv 2509.26307), nested heads each count.
            for head in sequence.heads.get(index, ()):
                out[1, here, head] += out[0, here, head]
            offset += count
        return self.ops.linear(out.flatten(2), layer.o)

    def _heads(
        self,
        normed: torch.Tensor,
        projection,
        norm: Norm | None,
        table: tuple[torch.Tensor, torch.Tensor],
        scale: float,
    ) -> torch.Tensor:
        """Rotated queries or keys, float32 [S, N, H, D]."""
        heads = self.ops.linear(normed, projection).unflatten(-1, (-1, self.hf.head_dim))
        return self.ops.rope(self._norm(heads, norm), table, scale)

    def _norm(self, streams: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        """As they are where the architecture has no norm there."""
        return streams if norm is None else self.ops.exact_norm(streams.float(), norm)


def _attention_kernel(hf: HFModel) -> Callable[..., Attend] | None:
    """The faster twin of `SequenceAttention` for the model's device, heads and dtype, if there is one."""
    if hf.device.type == "cpu":
        return cached_attention.CachedAttention if cached_attention.available(hf.head_dim) else None
    # On a GPU, where Triton may be missing.
    if not triton_support.available():
        return None
    from agd_vllm.kernels import dual_attention, tilings

    fitting = tilings.available(hf.head_dim, hf.unembedding.dtype)
    return dual_attention.DualAttention if fitting else None
