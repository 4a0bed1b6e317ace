"""The blocks of a tangent cache: one allocation that is never copied nor zeroed, handed out block by block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from agd_vllm.kernels import paged_attention

BLOCK_TOKENS = 16
"""Tokens of a block, by which prefixes are shared, too."""


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Layers, key-value heads, head size, and whether keys have tangents (CP-LRP's have none)."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    key_tangents: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def planes(self) -> int:
        """k, k', v, v'; or k, v, v'."""
        return 4 if self.key_tangents else 3

    @property
    def block_bytes(self) -> int:
        elements = self.num_layers * self.num_kv_heads * self.planes * BLOCK_TOKENS * self.head_dim
        return elements * self.dtype.itemsize


class BlockPool:
    """`num_blocks` blocks of BLOCK_TOKENS tokens, each held by so many sequences as count on it.

    `layers` [layers, blocks, K, planes, BLOCK_TOKENS, D]: what the paged attention reads of each layer. A block that
    nobody holds has any content.
    """

    def __init__(self, shape: CacheShape, num_blocks: int):
        size = (shape.num_layers, num_blocks, shape.num_kv_heads, shape.planes, BLOCK_TOKENS, shape.head_dim)
        self.layers = torch.empty(size, dtype=shape.dtype, device=shape.device)
        if shape.device.type == "cpu":
            paged_attention.large_pages(self.layers)
        self.num_blocks = num_blocks
        self._returned: list[int] = []
        self._never_used = 0
        self._holders = np.zeros(num_blocks, np.int32)

    @property
    def num_free(self) -> int:
        return self.num_blocks - self._never_used + len(self._returned)

    def take(self, count: int) -> np.ndarray:
        """That many blocks, int32, for one holder. Raises MemoryError where fewer are free."""
        if count > self.num_free:
            raise MemoryError(f"{count} blocks of the tangent cache are wanted, {self.num_free} are free")
        # Memory that has been used before costs nothing to touch.
        again = [self._returned.pop() for _ in range(min(count, len(self._returned)))]
        fresh = range(self._never_used, self._never_used + count - len(again))
        self._never_used += len(fresh)
        blocks = np.array([*again, *fresh], np.int32)
        self._holders[blocks] = 1
        return blocks

    def share(self, blocks: np.ndarray) -> None:
        """One more sequence holds them; none may be named twice."""
        self._holders[blocks] += 1

    def give_back(self, blocks: np.ndarray) -> None:
        """A sequence no longer holds them; none may be named twice."""
        self._holders[blocks] -= 1
        self._returned.extend(blocks[self._holders[blocks] == 0].tolist())

    def is_shared(self, block: int) -> bool:
        return self._holders[block] > 1

    def copy(self, source: int, target: int) -> None:
        """The content of one block into another, in all layers."""
        self.layers[:, target] = self.layers[:, source]


def blocks_for(tokens: int) -> int:
    """Blocks that so many tokens take."""
    return -(-tokens // BLOCK_TOKENS)
