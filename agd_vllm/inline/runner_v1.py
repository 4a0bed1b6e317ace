"""Where logits processor (which knows requests) and model (which knows tokens) meet in vLLM's Model Runner V1.

Row i of its persistent batch owns the tokens [starts[i], starts[i + 1]) of a forward pass and row i of the logits; the
processor's `update_state` names the rows before each pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context

from agd_vllm.attribution.regions import heads_by_layer, token_weights
from agd_vllm.inline.attention import DualAttention
from agd_vllm.inline.params import InlineParams
from agd_vllm.inline.runner import NAME, Step
from agd_vllm.kernels.paged_attention import PagedBatch


@dataclass(slots=True)
class InlineRow:
    """A row of the batch with a region. `output_ids` is vLLM's own running list."""

    params: InlineParams
    prompt_ids: list[int]
    output_ids: list[int]
    weights: torch.Tensor  # float32, of the prompt's tokens up to the region's end
    heads: dict[int, list[int]]

    @classmethod
    def of(cls, params: InlineParams, prompt_ids: list[int], output_ids: list[int]) -> InlineRow:
        roi = params.roi
        end = min(len(prompt_ids), max((span.end for span in roi.spans), default=0))
        return cls(params, prompt_ids, output_ids, token_weights(roi, 0, end), heads_by_layer(roi))

    @property
    def token_ids(self) -> list[int]:
        """Prompt and output so far."""
        return self.prompt_ids + self.output_ids


class RunnerV1:
    """One for each engine: `of` gives it, whoever asks first."""

    def __init__(self):
        self.rows: dict[int, InlineRow] = {}
        # Of the last pass: tokens of each row in the cache, its own included.
        self.reached: list[int] = []
        self.tangents = self.unembedding = torch.empty(0, 0)

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> RunnerV1:
        return vllm_config.compilation_config.static_forward_context.setdefault(NAME, cls())

    def serve(self, layer: DualAttention, num_layers: int) -> None:
        self._layer, self._num_layers, self._num_heads = layer.name, num_layers, layer.num_heads

    def sampled_steps(self) -> list[int | None]:
        """Of each row with a region, in their order: output tokens before the one that is sampled now, None where vLLM
        throws it away: that of an unfinished chunk of a prompt."""
        return [
            len(row.output_ids) if self.reached[i] == len(row.prompt_ids) + len(row.output_ids) else None
            for i, row in sorted(self.rows.items())
        ]

    def step(self, positions: torch.Tensor) -> Step:
        metadata = get_forward_context().attn_metadata
        if metadata is None:
            return Step(torch.zeros(len(positions)), None)
        batch = metadata[self._layer]
        starts, ends = batch.starts.long(), batch.ends.long()
        counts = starts.diff()
        lengths = ends - counts
        self.reached = ends.tolist()
        segments = list(zip(starts[:-1].tolist(), counts.tolist(), lengths.tolist(), strict=True))
        weights = torch.zeros(len(positions))
        for i, row in self.rows.items():
            start, count, before = segments[i]
            there = row.weights[before : before + count]
            weights[start : start + len(there)] = there
        heads = self._heads(segments, len(positions))
        paged = PagedBatch(batch.block_table, lengths, counts, batch.slots, positions, heads)
        return Step(weights, paged)

    def _heads(self, segments: list[tuple[int, int, int]], num_tokens: int) -> torch.Tensor | None:
        """Which heads are components of each token's region, float32 [layers, N, H]: 1, else 0."""
        rows = [(segments[i], row.heads) for i, row in self.rows.items() if row.heads]
        if not rows:
            return None
        mask = torch.zeros(self._num_layers, num_tokens, self._num_heads)
        for (start, count, _), heads in rows:
            for layer, members in heads.items():
                mask[layer, start : start + count, members] = 1
        return mask

    def keep(self, tangents: torch.Tensor, unembedding: torch.Tensor) -> None:
        self.tangents, self.unembedding = tangents, unembedding
