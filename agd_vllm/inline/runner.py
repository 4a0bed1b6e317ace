"""What a forward pass with tangents needs to know of vLLM's model runner, whichever it is."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from agd_vllm.kernels.paged_attention import PagedBatch


class Step(NamedTuple):
    """One forward pass. `weights` float32 [N]: the region's weight m of each token, so that its tangent starts as m E.
    `batch`: where its keys and values are kept, None where vLLM only measures or compiles."""

    weights: torch.Tensor
    batch: PagedBatch | None


class Runner(Protocol):
    """Made with the model, once; its implementations live beside the interfaces of the runners that they know."""

    def step(self, positions: torch.Tensor) -> Step:
        """For the tokens at these positions, int64 [N], in the order of the batch."""

    def keep(self, tangents: torch.Tensor, unembedding: torch.Tensor) -> None:
        """Takes x' of the rows whose logits are made now, float32 [rows, d], and the unembedding [vocabulary, d]: for
        whoever chooses the tokens of these rows."""
