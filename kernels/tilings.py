"""How the Triton kernels of the attention are cut into programs, by what a GPU has."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton

MAX_HEAD_DIM = 256
MIN_CAPABILITY = (8, 0)  # the first with products of bfloat16
SPLIT_KEYS = 512
"""Keys that a program of its own is worth, where there are too few programs to fill the GPU."""
PROGRAMS_PER_PROCESSOR = 4
MAX_SPLITS = 64
NO_WINDOW = 1 << 30


class Tiling(NamedTuple):
    """Rows of a tile (queries of the heads of one group), keys at a time, and how it is run."""

    rows: int
    keys: int
    warps: int
    stages: int

    def shared_bytes(self, block_d: int) -> int:
        """Queries, and keys and values of each stage, with their tangents, in bfloat16; and some room."""
        return (2 * self.rows + 4 * self.keys * self.stages) * block_d * 2 + (8 << 10)


# The best first; not yet measured: registers hardly spill where the first ones fit (Hopper, heads up to 128).
PREFILL = (
    Tiling(128, 64, 8, 2),
    Tiling(64, 32, 8, 2),
    Tiling(32, 32, 4, 1),
    Tiling(16, 16, 4, 1),
)
DECODE = (Tiling(16, 32, 4, 3), Tiling(16, 32, 4, 2), Tiling(16, 16, 4, 1))


def choose_tiling(tilings: Sequence[Tiling], block_d: int, group: int, shared_bytes: int) -> Tiling:
    """The first whose tiles fit the shared memory of a block; a group's heads always lie in one tile."""
    fitting = (tiling for tiling in tilings if tiling.shared_bytes(block_d) <= shared_bytes)
    tiling = next(fitting, tilings[-1])
    return tiling._replace(rows=max(tiling.rows, triton.next_power_of_2(group)))


def num_splits(programs: int, longest: int, processors: int) -> int:
    """How many programs share the keys of a tile, so that a few long sequences fill the GPU, too."""
    wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * processors, programs)
    return max(1, min(wanted, longest // SPLIT_KEYS, MAX_SPLITS))


@functools.cache
def processors(device: torch.device) -> tuple[int, int]:
    """How many multiprocessors there are, and the shared memory that a block may have. In the interpreter: any."""
    if device.type == "cpu":
        return 1, 1 << 18
    index = torch.cuda.current_device() if device.index is None else device.index
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return properties["multiprocessor_count"], properties["max_shared_mem"]


def available(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the GPU runs them for caches of that kind.

    Not for float32: Triton multiplies it exactly only without tensor cores, and the sums then fit no registers.
    """
    return dtype == torch.bfloat16 and head_dim <= MAX_HEAD_DIM and torch.cuda.get_device_capability() >= MIN_CAPABILITY
