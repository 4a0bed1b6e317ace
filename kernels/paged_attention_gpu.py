"""Softmax attention of paged sequences and of one tangent of each on an NVIDIA GPU: `attend` as in `paged_attention`.

All that is launched follows from the size of a batch and from what its host knows of it (GpuBatch), never from the
lengths of its sequences: it may be captured in a CUDA graph. The twin in PyTorch is `agd_vllm.attribution.paged_twin`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from agd_vllm.kernels import paged_attention_triton as kernels
from agd_vllm.kernels import paged_heads_triton, tilings, triton_support
from agd_vllm.kernels.paged_attention import PagedLayer, check_tensors

ELEMENTS_PER_WARP = 512


@dataclass(frozen=True, slots=True)
class GpuBatch:
    """The new tokens of one step, of N rows: those of each of R sequences follow one another, sequence by sequence.

    `block_table` int32 [R, P], as wide as the longest sequence that may come: the blocks of each sequence. `starts`
    int32 [R + 1]: its rows are [starts[i], starts[i + 1]). `ends` int32 [R]: its tokens, new ones included. `slots`
    int64 [N]: where a token's keys and values go, block * block size + offset; -1: nowhere. `positions` int64 [N].
    `sets` float32 [S, layers, H] and `set_of` int32 [N]: the part of each head that is a component of a token's region,
    on top of what its inputs are: o' += part * o; a token of set -1 has none. `singles`: so many sequences, the first
    ones, have one new token; where all of them do, those at the end may have none and a row of padding instead, whose
    attention is 0. None: only the device knows which have; there are as many sequences as rows then, of which those at
    the end may have no token, and rows at the end that no sequence has are padding.
    """

    block_table: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    sets: torch.Tensor
    set_of: torch.Tensor
    singles: int | None


def attend(layer: PagedLayer, batch: GpuBatch, index: int, cache: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
    """Norms and rotates queries and keys, adds keys and values to the cache, and attends.

    `cache` [blocks, K, planes, block size, D] of any strides but the last; `qkv` [2 N, (H + 2 K) D], contiguous. Gives
    [2 N, H D] in the dtype of qkv; products are those of the cache's dtype, sums float32. `index`: the layer's, in the
    batch's `sets`. Only where `tilings.available`, or interpreted.
    """
    rows = len(batch.slots)
    check_tensors(layer, rows, cache, qkv)
    heads, kv_heads, dim = layer.num_heads, layer.num_kv_heads, layer.head_dim
    streams, group = layer.planes - 2, layer.num_heads // layer.num_kv_heads
    kind = {"TYPE": _TYPES[cache.dtype], "D": dim, "BLOCK_D": max(16, triton.next_power_of_2(dim))}
    paged = {"STREAMS": streams, "GROUP": group, "SIZE": cache.shape[3], **kind}
    strides = cache.stride()[:4]
    queries = qkv.new_empty(streams, rows, heads, dim, dtype=cache.dtype)
    members = triton.next_power_of_2(group + 1)
    normed = layer.query_gain is not None
    paged_heads_triton.prepare[(rows, kv_heads)](
        qkv,
        batch.slots,
        batch.positions,
        layer.rope,
        layer.query_gain if normed else layer.rope,
        layer.key_gain if normed else layer.rope,
        queries,
        cache,
        rows,
        heads,
        layer.scale,
        layer.eps,
        *strides,
        NORMED=normed,
        THROUGH_NORM=layer.through_norm,
        MEMBERS=members,
        **paged,
        num_warps=max(1, min(8, members * kind["BLOCK_D"] // ELEMENTS_PER_WARP)),
    )
    out = qkv.new_empty(len(qkv), heads * dim)
    call = _Call(layer, batch, index, cache, queries, out, paged)
    sequences, singles = len(batch.ends), batch.singles
    if singles is None:
        call.run(_BOTH if rows > 1 else _SINGLE, 0, sequences, 0, rows)
        return out
    if singles:
        call.run(_SINGLE, 0, singles, 0, singles)
    if singles < sequences:
        call.run(_SEVERAL, singles, sequences - singles, singles, rows - singles)
    return out


_SINGLE, _SEVERAL, _BOTH = (True,), (False,), (True, False)
"""Launches: for sequences of one new token, for those of several, and for either kind where both may be there."""


@dataclass(frozen=True, slots=True)
class _Call:
    layer: PagedLayer
    batch: GpuBatch
    index: int
    cache: torch.Tensor
    queries: torch.Tensor
    out: torch.Tensor
    paged: dict

    def run(self, kinds: tuple[bool, ...], first_sequence: int, sequences: int, first_row: int, rows: int) -> None:
        """The sequences from the first one on, whose rows lie from `first_row` on."""
        layer, batch, block_d = self.layer, self.batch, self.paged["BLOCK_D"]
        group, (processors, shared) = self.paged["GROUP"], tilings.processors(self.out.device)
        launches = []
        for single in kinds:
            tiling = tilings.choose_tiling(tilings.DECODE if single else tilings.PREFILL, block_d, group, shared)
            launches.append((single, tiling, sequences if single else rows // (tiling.rows // group) + sequences))
        longest = min(batch.block_table.shape[1] * self.cache.shape[3], layer.window or tilings.NO_WINDOW)
        # Of both kinds the same, so that their sums are combined at once.
        splits = tilings.num_splits(launches[0][2] * layer.num_kv_heads, longest, processors)
        # What the splits of a query have summed up: rows of values, then l, sum c (of r = 0) and m.
        sums = numbers = self.queries
        if splits > 1:
            sums = self.queries.new_empty(rows, splits, layer.num_heads, 2, layer.head_dim, dtype=torch.float32)
            numbers = sums.new_empty(rows, splits, layer.num_heads, 3)
        place = first_sequence, sequences, first_row
        for single, tiling, tiles in launches:
            self._attend((tiles, layer.num_kv_heads, splits), sums, numbers, place, single, len(kinds) > 1, tiling)
        if splits > 1:
            sets = batch.sets[:, self.index]
            kernels.combine[(rows, layer.num_heads)](
                sums,
                numbers,
                self.out,
                batch.starts,
                sets,
                batch.set_of,
                len(batch.slots),
                first_row,
                splits,
                layer.value_factor,
                sets.stride(0),
                first_sequence + sequences,
                D=layer.head_dim,
                BLOCK_D=block_d,
                num_warps=1,
            )

    def _attend(
        self,
        grid: tuple[int, int, int],
        sums: torch.Tensor,
        numbers: torch.Tensor,
        place: tuple[int, int, int],
        single: bool,
        mixed: bool,
        tiling: tilings.Tiling,
    ) -> None:
        layer, batch = self.layer, self.batch
        # To look a page up takes a stage of its own: as many as before are then ahead with its rows.
        stages = 2 * tiling.stages - 1 if single else tiling.stages
        sets = batch.sets[:, self.index]
        kernels.attend[grid](
            self.queries,
            self.out,
            sums,
            numbers,
            self.cache,
            batch.block_table,
            batch.starts,
            batch.ends,
            sets,
            batch.set_of,
            len(batch.slots),
            layer.num_heads,
            *place,
            layer.window or tilings.NO_WINDOW,
            layer.score_factor / layer.value_factor,
            layer.value_factor,
            sets.stride(0),
            batch.block_table.stride(0),
            *self.cache.stride()[:4],
            SINGLE=single,
            MIXED=mixed,
            WINDOW=layer.window is not None,
            SPLIT=grid[2] > 1,
            ROWS=tiling.rows,
            KEYS=tiling.keys,
            INTERPRETED=triton_support.interpreted(),
            **self.paged,
            num_warps=tiling.warps,
            num_stages=stages,
        )


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
