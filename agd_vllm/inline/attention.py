"""Attention over values and tangents as vLLM sees it: a layer, its backend, and the metadata of a batch.

The layer takes the plain attention's name, so that scheduler, block tables, prefix cache and preemption are vLLM's own;
only a page is larger: keys and values of both streams (with CP-LRP, whose keys have no tangent, three planes of four).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout

from agd_vllm.attribution import paged_twin
from agd_vllm.attribution.rules import Rule
from agd_vllm.kernels import paged_attention
from agd_vllm.kernels.paged_attention import PagedLayer

# Tokens of a block: what the kernel reads at once.
BLOCK_MULTIPLE = 16


@dataclass(frozen=True, slots=True)
class DualMetadata:
    """The rows of a batch, in its order: tokens [starts[i], starts[i + 1]) are those of row i, which has `ends[i]`
    tokens in the cache with them, in the blocks of `block_table[i]`; token n goes to `slots[n]` (-1: nowhere). The
    first `singles` rows have one token each; where all have, those at the end may pad the batch and have none."""

    block_table: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    slots: torch.Tensor
    singles: int


class DualBuilder(AttentionMetadataBuilder[DualMetadata]):
    """Makes the metadata of a batch: where each row's tokens lie, and its region."""

    # What is launched for rows of one token depends on their number only.
    _cudagraph_support: ClassVar = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> DualMetadata:
        batch = common_attn_metadata
        counts = batch.query_start_loc_cpu.diff().tolist()
        singles = len(counts) if max(counts) <= 1 else next(i for i, count in enumerate(counts) if count != 1)
        return DualMetadata(
            batch.block_table_tensor, batch.query_start_loc, batch.seq_lens, batch.slot_mapping, singles
        )


class DualBackend(AttentionBackend):
    """vLLM's interface to attention over values and tangents."""

    supported_dtypes: ClassVar = [torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "AGD_DUAL"

    @staticmethod
    def get_impl_cls():
        """None: the layer calls the kernel itself."""

    @staticmethod
    def get_builder_cls() -> type[DualBuilder]:
        return DualBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[MultipleOf]:
        return [MultipleOf(BLOCK_MULTIPLE)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # A layer's page lies in one piece, and may be read as the kernel likes.
        return (KVCacheLayout.LBHNC,)


class DualAttention(nn.Module, AttentionLayerBase):
    """One layer's attention, registered under `name` with `vllm_config`; to be told the rest by `prepare`, once the
    weights are loaded."""

    def __init__(
        self, vllm_config: VllmConfig, name: str, num_heads: int, num_kv_heads: int, head_dim: int, rule: Rule
    ):
        super().__init__()
        self.name, self.num_heads = name, num_heads
        self._num_kv_heads, self._head_dim = num_kv_heads, head_dim
        self._rule = rule
        self._dtype = vllm_config.model_config.dtype
        self.kernel = kernel(vllm_config.device_config.device, head_dim)
        self.kv_cache = torch.tensor([])
        vllm_config.compilation_config.static_forward_context[name] = self

    def prepare(self, index: int, layer: PagedLayer) -> None:
        self._index, self._layer = index, layer

    def get_attn_backend(self) -> type[AttentionBackend]:
        return DualBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> FullAttentionSpec:
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self._num_kv_heads,
            head_size=self._head_dim * (2 if self._rule.scores else 1),
            head_size_v=self._head_dim * 2,
            dtype=self._dtype,
        )

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """`kv_cache` [blocks, K, block size, planes x D], each block in one piece: read as [blocks, K, planes, block
        size, D]."""
        blocks, heads, size, _ = kv_cache.shape
        if kv_cache.device.type == "cpu":
            paged_attention.large_pages(kv_cache)
        self.kv_cache = kv_cache.view(blocks, heads, -1, size, self._head_dim)

    def forward(self, batch: Any | None, qkv: torch.Tensor) -> torch.Tensor:
        """qkv [2 N, (H + 2 K) D], values before tangents, neither rotated, to [2 N, H D]; `batch` as the kernel takes
        it, None where nothing is kept."""
        if batch is None:
            return qkv.new_zeros(len(qkv), self.num_heads * self._head_dim)
        return self.kernel.attend(self._layer, batch, self._index, self.kv_cache, qkv)


def kernel(device: torch.device, head_dim: int) -> ModuleType:
    """The module whose `attend` serves this device; what it takes for a batch is its own."""
    if device.type == "cuda":
        from agd_vllm.kernels import paged_attention_gpu

        return paged_attention_gpu
    return paged_attention if paged_attention.available(head_dim) else paged_twin
