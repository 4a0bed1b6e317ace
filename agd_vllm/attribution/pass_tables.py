"""What a tangent pass is told of its sequences: arrays on the host, one copy of them to the device, and there buffers
that are made once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch

from agd_vllm.attribution import paged_twin
from agd_vllm.attribution.block_pool import BLOCK_TOKENS, CacheShape, blocks_for
from agd_vllm.attribution.tangent_cache import CachedSequence
from agd_vllm.kernels import paged_attention
from agd_vllm.kernels.paged_attention import PagedBatch
from agd_vllm.kernels.to_device import pack, packed_bytes, to_device, unpack

NO_SET, NOWHERE = -1, -1


@dataclass(frozen=True, slots=True, eq=False)
class PassTables:
    """Of N rows: `ids` int64 and region `weights` float32 [N], and the `batch` that the attention's kernel takes."""

    ids: torch.Tensor
    weights: torch.Tensor
    batch: Any


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """`ids` int64 [C], and the row of the last token before each, int64 [C]."""

    ids: torch.Tensor
    rows: torch.Tensor


class PassBuffers:
    """Tables of passes of at most `max_rows` tokens, of sequences of at most `max_length`.

    They lie where they were first made: what a pass of N rows reads has addresses that follow from N alone. Of its N
    sequences those at the end may have no token, and rows at the end that no sequence has are padding, which belongs to
    no region and is kept nowhere.
    """

    def __init__(self, shape: CacheShape, num_heads: int, kernel: ModuleType, max_rows: int, max_length: int):
        self._shape, self._kernel = shape, kernel
        self._by_row = torch.empty(packed_bytes(_padding(max_rows)), dtype=torch.uint8, device=shape.device)
        self._table = torch.zeros(max_rows, blocks_for(max_length), dtype=torch.int32, device=shape.device)
        self._views: dict[int, dict[str, torch.Tensor]] = {}
        self._sets = torch.zeros(max_rows, shape.num_layers, num_heads, device=shape.device)

    def fill(
        self,
        segments: Sequence[tuple[CachedSequence, int]],
        candidates: Sequence[Sequence[int]],
        size: int,
    ) -> tuple[PassTables, Candidates]:
        """Tables of a pass of `size` rows for the next tokens of each segment (sequence, count), whose blocks have room
        for them, and for its candidates."""
        sequences = [sequence for sequence, _ in segments]
        counts = np.array([count for _, count in segments], np.int64)
        lengths = np.array([sequence.length for sequence in sequences], np.int64)
        starts = np.concatenate(([0], counts.cumsum()))
        used = int(starts[-1])
        rows = np.repeat(np.arange(len(sequences)), counts)
        positions = np.arange(used) - np.repeat(starts[:-1] - lengths, counts)

        held = np.array([len(sequence.blocks) for sequence in sequences])
        blocks = np.concatenate([sequence.blocks for sequence in sequences])
        first_block = held.cumsum() - held
        in_table = np.arange(len(blocks)) + np.repeat(np.arange(len(held)) * self._table.shape[1] - first_block, held)
        page, offset = np.divmod(positions, BLOCK_TOKENS)

        arrays = _padding(size)
        arrays["positions"][:used] = positions
        arrays["slots"][:used] = blocks[first_block[rows] + page].astype(np.int64) * BLOCK_TOKENS + offset
        arrays["starts"][: len(starts)] = starts
        arrays["starts"][len(starts) :] = used
        arrays["ends"][: len(counts)] = lengths + counts
        for (sequence, count), start in zip(segments, starts.tolist(), strict=False):
            new = slice(sequence.length, sequence.length + count)
            arrays["ids"][start : start + count] = sequence.tokens[new]
            there = sequence.weights[new]
            arrays["weights"][start : start + len(there)] = there
        sets, set_of = _head_sets(sequences, *self._sets.shape[1:])
        arrays["set_of"][:used] = set_of[rows]

        per_segment = [len(each) for each in candidates]
        beside = {
            "blocks": blocks,
            "in_table": in_table,
            "sets": sets,
            "candidate_ids": np.array([candidate for each in candidates for candidate in each], np.int64),
            "candidate_rows": np.repeat(starts[1:] - 1, per_segment),
        }
        there = self._copy(arrays, beside)
        self._table.view(-1).index_copy_(0, there["in_table"], there["blocks"])
        self._sets[: len(sets)].copy_(there["sets"])
        return self._tables(arrays, len(sets) > 0), Candidates(there["candidate_ids"], there["candidate_rows"])

    def pad(self, size: int) -> PassTables:
        """Tables of a pass of nothing but padding."""
        arrays = _padding(size)
        self._copy(arrays, {})
        return self._tables(arrays, False)

    def _copy(self, by_row: dict[str, np.ndarray], beside: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """All in one copy to the device; those by row then go to their place there."""
        arrays = by_row | beside
        there, size = to_device(pack(arrays), self._shape.device), packed_bytes(by_row)
        self._by_row[:size].copy_(there[:size])
        return unpack(there, arrays)

    def _tables(self, arrays: dict[str, np.ndarray], with_heads: bool) -> PassTables:
        size = len(arrays["ids"])
        there = self._views.get(size)
        if there is None:
            there = self._views[size] = unpack(self._by_row, arrays)
        table = self._table[:size]
        if self._kernel in (paged_attention, paged_twin):
            batch = self._host_batch(arrays, there, table, with_heads)
        else:
            of_rows = there["slots"], there["positions"], self._sets, there["set_of"]
            batch = self._kernel.GpuBatch(table, there["starts"], there["ends"], *of_rows, singles=None)
        return PassTables(there["ids"], there["weights"], batch)

    def _host_batch(
        self, arrays: dict[str, np.ndarray], there: dict[str, torch.Tensor], table: torch.Tensor, with_heads: bool
    ) -> PagedBatch:
        """Only of sequences that have tokens: on the host that is known."""
        counts = np.trim_zeros(np.diff(arrays["starts"]).astype(np.int64))
        lengths = torch.from_numpy(arrays["ends"][: len(counts)] - counts)
        heads = None
        if with_heads:
            chosen = there["set_of"].long()
            heads = self._sets[chosen.clamp(min=0)] * (chosen != NO_SET)[:, None, None]
            heads = heads.transpose(0, 1).contiguous()
        of_sequences = table[: len(counts)], lengths, torch.from_numpy(counts)
        return PagedBatch(*of_sequences, there["slots"], there["positions"], heads)


def _padding(size: int) -> dict[str, np.ndarray]:
    """What a pass has for each of its rows and sequences, where all are padding."""
    return {
        "ids": np.zeros(size, np.int64),
        "positions": np.zeros(size, np.int64),
        "slots": np.full(size, NOWHERE, np.int64),
        "weights": np.zeros(size, np.float32),
        "set_of": np.full(size, NO_SET, np.int32),
        "ends": np.zeros(size, np.int32),
        "starts": np.zeros(size + 1, np.int32),
    }


def _head_sets(sequences: Sequence[CachedSequence], num_layers: int, num_heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct sets of heads, float32 [sets, layers, H], and each sequence's, int32, NO_SET where it has no head.

    A head of the region is a component itself: o' += o (arXiv 2509.26307), nested heads each count.
    """
    numbers: dict[tuple[tuple[int, int], ...], int] = {}
    set_of = np.array(
        [numbers.setdefault(each.roi.heads, len(numbers)) if each.roi.heads else NO_SET for each in sequences], np.int32
    )
    sets = np.zeros((len(numbers), num_layers, num_heads), np.float32)
    for heads, number in numbers.items():
        for layer, head in heads:
            sets[number, layer, head] = 1
    return sets, set_of
