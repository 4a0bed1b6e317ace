"""Attention of cached sequences and of their tangents on an NVIDIA GPU, all sequences of a batch in one launch.

Its twin in PyTorch is `agd_vllm.attribution.sequence_attention`; `cached_attention` is the same for a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from agd_vllm.kernels import dual_attention_triton as kernels
from agd_vllm.kernels import triton_support
from agd_vllm.kernels.tilings import DECODE, NO_WINDOW, PREFILL, Tiling, choose_tiling, num_splits, processors
from agd_vllm.kernels.to_device import to_device


class _Launch(NamedTuple):
    """Tiles [tiles, 2] of queries: a sequence and the first of its new tokens, `tokens` of them each.

    `longest`: the most keys that one of them meets.
    """

    tiles: torch.Tensor
    tokens: int
    tiling: Tiling
    longest: int


class DualAttention:
    """Ragged sequences of one batch: caches [layers, K, streams, capacity, D] in float32 or bfloat16, with
    `length` tokens in them each.

    `sequences`: (keys, values, length, count) of each, whose `count` new tokens are the next rows of the batch.
    `score_factor` and `value_factor` are the rule's f and h. Only where `tilings.available`.
    """

    def __init__(
        self,
        sequences: Sequence[tuple[torch.Tensor, torch.Tensor, int, int]],
        score_factor: float,
        value_factor: float,
    ):
        table, rows = [], 0
        for keys, values, length, count in sequences:
            table.append((keys.data_ptr(), values.data_ptr(), keys.shape[3], length, count, rows))
            rows += count
        keys, values = sequences[0][:2]
        self._device = keys.device
        self._kv_heads, head_dim = keys.shape[1], keys.shape[4]
        self._kind = {
            "TYPE": _TYPES[keys.dtype],
            "D": head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        }
        self._streams, self._key_streams = values.shape[2], keys.shape[2]
        self._ratio, self._value_factor = score_factor / value_factor, value_factor
        self._lengths = [(length, count) for _, _, length, count in sequences]
        self._sequences = self._table(table)
        self._tokens = self._table(
            [(index, number) for index, (_, count) in enumerate(self._lengths) for number in range(count)]
        )
        self._launches: list[_Launch] | None = None

    def __call__(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        """One layer: adds the new keys (float32) and values (of any dtype) to the caches and attends.

        queries [key streams, rows, H, D] (scaled by 1 / sqrt(d)), keys [key streams, rows, K, D], values
        [S, rows, K, D]; `window`: a query sees that many positions, its own included. Returns float32 [S, rows, H, D].
        """
        queries, keys, values = queries.contiguous(), keys.contiguous(), values.contiguous()
        if self._launches is None:
            self._launches = self._plan(queries.shape[2] // self._kv_heads)
        rows = len(self._tokens)
        kernels.append[(rows, self._kv_heads)](
            self._sequences,
            self._tokens,
            keys,
            values,
            layer,
            rows,
            self._streams,
            self._key_streams,
            **self._kind,
            num_warps=1,
        )
        out = queries.new_empty(self._streams, *queries.shape[1:])
        for launch in self._launches:
            self._attend(launch, layer, queries, out, window)
        return out

    def _attend(
        self, launch: _Launch, layer: int, queries: torch.Tensor, out: torch.Tensor, window: int | None
    ) -> None:
        _, rows, heads, head_dim = queries.shape
        tangents, (tile_rows, tile_keys, warps, stages) = self._streams - 1, launch.tiling
        programs = len(launch.tiles) * self._kv_heads * tangents
        splits = num_splits(programs, min(launch.longest, window or NO_WINDOW), processors(self._device)[0])
        # What the splits of a query have summed up: rows of values, then l, sum c and m.
        sums, numbers = out, out
        if splits > 1:
            sums = out.new_empty(splits, tangents, rows, heads, 2, head_dim)
            numbers = out.new_empty(splits, tangents, rows, heads, 3)
        kernels.attend[(len(launch.tiles), self._kv_heads * tangents, splits)](
            self._sequences,
            launch.tiles,
            queries,
            out,
            sums,
            numbers,
            layer,
            rows,
            heads,
            heads // self._kv_heads,
            tangents,
            window or NO_WINDOW,
            self._ratio,
            self._value_factor,
            KEY_TANGENTS=self._key_streams > 1,
            WINDOW=window is not None,
            SPLIT=splits > 1,
            ROWS=tile_rows,
            KEYS=tile_keys,
            INTERPRETED=triton_support.interpreted(),
            **self._kind,
            num_warps=warps,
            num_stages=stages,
        )
        if splits > 1:
            kernels.combine[(len(launch.tiles) * launch.tokens, heads, tangents)](
                self._sequences,
                launch.tiles,
                launch.tokens,
                sums,
                numbers,
                out,
                rows,
                splits,
                self._value_factor,
                D=head_dim,
                BLOCK_D=self._kind["BLOCK_D"],
                num_warps=1,
            )

    def _plan(self, group: int) -> list[_Launch]:
        """Small tiles for sequences with a few new tokens, large ones for the others."""
        launches = []
        _, shared = processors(self._device)
        small, large = (choose_tiling(kind, self._kind["BLOCK_D"], group, shared) for kind in (DECODE, PREFILL))
        few = small.rows // group
        for tiling in (small, large):
            tokens = tiling.rows // group
            tiles = [
                (length + start, index, start)
                for index, (length, count) in enumerate(self._lengths)
                if (count <= few) == (tiling is small)
                for start in range(0, count, tokens)
            ]
            if tiles:
                # The longest first: they would end last.
                tiles.sort(reverse=True)
                table = self._table([(index, start) for _, index, start in tiles])
                launches.append(_Launch(table, tokens, tiling, longest=tiles[0][0] + tokens))
        return launches

    def _table(self, rows: list[tuple[int, ...]]) -> torch.Tensor:
        return to_device(torch.tensor(rows, dtype=torch.int64), self._device)


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
