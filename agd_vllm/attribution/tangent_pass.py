"""The tangent pass: the next tokens of several cached sequences through the decoder, values and tangents together."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch

from agd_vllm.attribution import paged_twin
from agd_vllm.attribution.adapters import Layer, adapt
from agd_vllm.attribution.block_pool import BlockPool, CacheShape
from agd_vllm.attribution.hf_model import HFModel
from agd_vllm.attribution.linears import linears
from agd_vllm.attribution.operations import Operations
from agd_vllm.attribution.pass_tables import PassBuffers, PassTables
from agd_vllm.attribution.rules import RULES, Norm
from agd_vllm.attribution.static_pass import SIZES, StaticPass
from agd_vllm.attribution.tangent_cache import CachedSequence
from agd_vllm.kernels import paged_attention, triton_support
from agd_vllm.kernels.paged_attention import PagedLayer


class TangentPass:
    """Pushes streams through the layers of `hf` by the rule of that name (attnlrp, cplrp or ixg).

    A pass has at most `max_rows` tokens, a sequence at most `max_length`. The linear layers see the tokens of all
    sequences side by side, [2, N, d]; in attention each sequence has its own blocks of the cache, of the kind `shape`.
    The residual stream, norms, softmax and gates are float32, linear layers take the weights' dtype.
    """

    def __init__(self, hf: HFModel, rule: str, max_rows: int, max_length: int):
        self.hf = hf
        self.rule = RULES[rule]
        self.decoder = adapt(hf)
        self.linear = linears(self.decoder)
        self.ops = Operations(self.rule, self.decoder.activation, hf.unembedding.dtype, hf.device)
        self.kernel = attention_kernel(hf.device, hf.head_dim, hf.unembedding.dtype)
        # What PyTorch multiplies in float32 anyway is kept so on a CPU.
        in_float = hf.device.type == "cpu" and self.kernel is paged_twin
        self.shape = CacheShape(
            num_layers=hf.num_layers,
            num_kv_heads=hf.num_kv_heads,
            head_dim=hf.head_dim,
            key_tangents=self.rule.scores != 0,
            dtype=torch.float32 if in_float else hf.unembedding.dtype,
            device=hf.device,
        )
        self._attention = self._layers(max_length)
        self._buffers = PassBuffers(self.shape, hf.num_heads, self.kernel, max_rows, max_length)
        padded = self.kernel not in (paged_attention, paged_twin)
        sizes = [*(size for size in SIZES if size < max_rows), max_rows] if padded else None
        self.static = StaticPass(self.through_layers, self._buffers, sizes)

    def capture(self, pool: BlockPool) -> None:
        """Where passes can be captured, those over this pool are from now on."""
        if self.static.sizes is not None and self.hf.device.type == "cuda" and pool.num_blocks:
            self.static.capture(pool.layers)

    def extend(
        self,
        segments: Sequence[tuple[CachedSequence, int]],
        pool: BlockPool,
        candidates: Sequence[Sequence[int]],
    ) -> torch.Tensor:
        """Compute the next tokens of each sequence, which has blocks of `pool` for them, and add them to its cache.

        A segment is (sequence, count), `candidates` are the ids that may follow its last token. Returns the scores
        S(c, R) of all of them, segment by segment, float32 [candidates] on the device.
        """
        size = self.static.size_for(sum(count for _, count in segments))
        tables, follow = self._buffers.fill(segments, candidates, size)
        tangents = self.static.run(tables, pool.layers)
        for sequence, count in segments:
            sequence.length += count
        return (tangents[follow.rows] * self.hf.unembedding[follow.ids].float()).sum(-1)

    def through_layers(self, tables: PassTables, cache: torch.Tensor) -> torch.Tensor:
        """The tangents after the final norm, float32 [N, d]; `cache` as in `BlockPool.layers`.

        Where no twin is among the kernels, all that is launched follows from N, and nothing waits for the device.
        """
        streams, ops, linear, out = self._embed(tables), self.ops, self.linear, None
        for index, layer in enumerate(self.decoder.layers):
            qkv = linear(ops.norm(streams, layer.attention_norm, out), layer.qkv)
            attended = self.kernel.attend(self._attention[index], tables.batch, index, cache[index], qkv.flatten(0, 1))
            out = self._norm(linear(attended.unflatten(0, (2, -1)), layer.o), layer.attention_output_norm)
            hidden = ops.gated(linear(ops.norm(streams, layer.mlp_norm, out), layer.gate_up))
            out = self._norm(linear(hidden, layer.down), layer.mlp_output_norm)
        return ops.exact_norm(streams, self.decoder.final_norm, out)[1]

    def _embed(self, tables: PassTables) -> torch.Tensor:
        """Streams [2, N, d] at the input: embeddings E, and m * E for the region."""
        embeddings = self.hf.stack.embed_tokens(tables.ids)
        streams = embeddings.new_empty(2, *embeddings.shape, dtype=torch.float32)
        streams[0] = embeddings
        torch.mul(streams[0], tables.weights[:, None], out=streams[1])
        return streams

    def _norm(self, streams: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        """As they are where the architecture has no norm there."""
        return streams if norm is None else self.ops.exact_norm(streams.float(), norm)

    def _layers(self, max_length: int) -> list[PagedLayer]:
        """The layers' attention, with rotary tables for sequences of that many tokens."""
        positions = torch.arange(max_length, device=self.hf.device)
        ropes = {}
        for name in {layer.rope for layer in self.decoder.layers}:
            tables = self.decoder.rotary(name, positions)
            ropes[name] = torch.cat([table[:, : self.hf.head_dim // 2] for table in tables], -1).contiguous()
        return [self._paged(layer, ropes[layer.rope]) for layer in self.decoder.layers]

    def _paged(self, layer: Layer, rope: torch.Tensor) -> PagedLayer:
        return PagedLayer(
            num_heads=self.hf.num_heads,
            num_kv_heads=self.hf.num_kv_heads,
            head_dim=self.hf.head_dim,
            scale=layer.scaling,
            rope=rope,
            score_factor=self.rule.scores,
            value_factor=self.rule.values,
            window=layer.window,
            query_gain=layer.q_norm and layer.q_norm.gain,
            key_gain=layer.k_norm and layer.k_norm.gain,
            eps=layer.q_norm.eps if layer.q_norm else 0.0,
            through_norm=self.rule.through_norm,
        )


def attention_kernel(device: torch.device, head_dim: int, dtype: torch.dtype) -> ModuleType:
    """The module whose `attend` serves the model's device, heads and dtype."""
    if device.type == "cpu" and paged_attention.available(head_dim):
        return paged_attention
    # On a GPU, where Triton may be missing.
    if device.type == "cuda" and triton_support.available():
        from agd_vllm.kernels import paged_attention_gpu, tilings

        if tilings.available(head_dim, dtype):
            return paged_attention_gpu
    return paged_twin
