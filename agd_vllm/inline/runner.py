"""What a forward pass with tangents needs to know of vLLM's model runner, whichever it is."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch

from agd_vllm.inline.attention import DualAttention

# Where a runner's own object lies beside the layers in static_forward_context: vLLM filters that by type.
NAME = "agd_vllm.inline"


class Step(NamedTuple):
    """One forward pass. `weights` float32 [N]: the region's weight m of each token, so that its tangent starts as m E.
    `batch`: where its keys and values are kept, as the attention's kernel takes it; None where vLLM only measures."""

    weights: torch.Tensor
    batch: Any | None


class Runner(Protocol):
    """Made with the model, once; its implementations live beside the interfaces of the runners that they know."""

    def serve(self, layer: DualAttention, num_layers: int) -> None:
        """The model's part: a `layer` whose metadata, kernel and number of heads are those of all."""

    def step(self, positions: torch.Tensor) -> Step:
        """For the tokens at these positions, int64 [N], in the order of the batch."""

    def keep(self, tangents: torch.Tensor, unembedding: torch.Tensor) -> None:
        """Takes x' of the rows whose logits are made now, float32 [rows, d], and the unembedding [vocabulary, d]: for
        whoever chooses the tokens of these rows."""
