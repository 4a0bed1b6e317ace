"""What a tangent pass is told of its sequences: arrays on the host, and one copy of them to the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch

from agd_vllm.attribution import paged_twin
from agd_vllm.attribution.block_pool import BLOCK_TOKENS, CacheShape
from agd_vllm.attribution.tangent_cache import CachedSequence
from agd_vllm.kernels import paged_attention
from agd_vllm.kernels.paged_attention import PagedBatch
from agd_vllm.kernels.to_device import arrays_to_device


@dataclass(frozen=True, slots=True, eq=False)
class PassTables:
    """Of N tokens: `ids` int64 and region `weights` float32 [N], and the `batch` that the attention's kernel takes.

    `last` int64 [segments]: the row of each one's last token. `candidate_ids` int64 [C], and `candidate_of` int64 [C],
    the segment of each.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    batch: Any
    last: torch.Tensor
    candidate_ids: torch.Tensor
    candidate_of: torch.Tensor


def make_tables(
    segments: Sequence[tuple[CachedSequence, int]],
    candidates: Sequence[Sequence[int]],
    shape: CacheShape,
    num_heads: int,
    kernel: ModuleType,
) -> PassTables:
    """Of the next tokens of each segment (sequence, count), whose blocks have room for them, and of its candidates."""
    # The GPU's kernel wants sequences of one new token first.
    order = sorted(range(len(segments)), key=lambda number: segments[number][1] > 1)
    sequences = [segments[number][0] for number in order]
    counts = np.array([segments[number][1] for number in order])
    lengths = np.array([sequence.length for sequence in sequences])
    starts = np.concatenate(([0], counts.cumsum()))
    width = max(len(sequence.blocks) for sequence in sequences)
    table = np.zeros((len(sequences), width), np.int32)
    weights = np.zeros(starts[-1], np.float32)
    ids: list[int] = []
    for row, sequence in enumerate(sequences):
        table[row, : len(sequence.blocks)] = sequence.blocks
        begin, end = sequence.length, sequence.length + segments[order[row]][1]
        if begin < len(sequence.weights):
            there = sequence.weights[begin:end]
            weights[len(ids) : len(ids) + len(there)] = there
        ids += sequence.tokens[begin:end]
    rows = np.repeat(np.arange(len(sequences)), counts)
    positions = np.arange(starts[-1]) - np.repeat(starts[:-1] - lengths, counts)
    blocks, offsets = np.divmod(positions, BLOCK_TOKENS)
    last = np.empty(len(order), np.int64)
    last[order] = starts[1:] - 1
    sets, set_of = _head_sets(sequences, shape.num_layers, num_heads)
    arrays = {
        "ids": np.array(ids, np.int64),
        "weights": weights,
        "positions": positions,
        "slots": table[rows, blocks].astype(np.int64) * BLOCK_TOKENS + offsets,
        "table": table,
        "last": last,
        "candidate_ids": np.array([candidate for each in candidates for candidate in each], np.int64),
        "candidate_of": np.repeat(np.arange(len(order)), [len(each) for each in candidates]),
        "starts": starts.astype(np.int32),
        "ends": (lengths + counts).astype(np.int32),
        "sets": sets,
        "set_of": set_of[rows],
    }
    there = arrays_to_device(arrays, shape.device)
    table, slots, positions = there["table"], there["slots"], there["positions"]
    if kernel in (paged_attention, paged_twin):
        heads = there["sets"][there["set_of"]].transpose(0, 1).contiguous() if len(sets) > 1 else None
        batch = PagedBatch(table, torch.from_numpy(lengths), torch.from_numpy(counts), slots, positions, heads)
    else:
        of_sequences, singles = (there["starts"], there["ends"]), int((counts == 1).sum())
        batch = kernel.GpuBatch(table, *of_sequences, slots, positions, there["sets"], there["set_of"], singles)
    return PassTables(
        there["ids"], there["weights"], batch, there["last"], there["candidate_ids"], there["candidate_of"]
    )


def _head_sets(sequences: Sequence[CachedSequence], num_layers: int, num_heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct sets of heads, float32 [sets, layers, H] of which the first is empty, and each sequence's, int32.

    A head of the region is a component itself: o' += o (arXiv 2509.26307), nested heads each count.
    """
    numbers: dict[tuple[tuple[int, int], ...], int] = {(): 0}
    set_of = np.array([numbers.setdefault(each.roi.heads, len(numbers)) for each in sequences], np.int32)
    sets = np.zeros((len(numbers), num_layers, num_heads), np.float32)
    for heads, number in numbers.items():
        for layer, head in heads:
            sets[number, layer, head] = 1
    return sets, set_of
