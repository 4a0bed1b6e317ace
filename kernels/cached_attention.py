"""Attention of cached sequences and of their tangents on a CPU, all sequences of a batch in one call.

Its twin in PyTorch is `agd_vllm.attribution.sequence_attention`, one sequence after another.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch

from agd_vllm.kernels import compiled

HEAD_DIMS = (16, 32, 64, 96, 128, 256)
NO_CODE, NO_MEMORY = 1, 2


class _Shape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64) for name in ("rows", "streams", "key_streams", "heads", "kv_heads", "window", "half")
    ]
    _fields_ += [("score_factor", ctypes.c_float), ("value_factor", ctypes.c_float)]


class CachedAttention:
    """Ragged sequences of one batch: caches [layers, K, streams, capacity, D] in float32 or bfloat16, with
    `length` tokens in them each.

    `sequences`: (keys, values, length, count) of each, whose `count` new tokens are the next rows of the batch.
    `score_factor` and `value_factor` are the rule's f and h. Only where `available`.
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
        self._sequences = torch.tensor(table, dtype=torch.int64)
        keys, values = sequences[0][:2]
        self._shape = _Shape(
            rows=rows,
            streams=values.shape[2],
            key_streams=keys.shape[2],
            kv_heads=keys.shape[1],
            half=keys.dtype == torch.bfloat16,
            score_factor=score_factor,
            value_factor=value_factor,
        )
        self._attend = _function()

    def __call__(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        """One layer: adds the new keys (float32) and values (of any dtype) to the caches and attends.

        queries [key streams, rows, H, D] (scaled by 1 / sqrt(d)), keys [key streams, rows, K, D], values
        [S, rows, K, D]; `window`: a query sees that many positions, its own included. Returns float32 [S, rows, H, D].
        """
        shape = self._shape
        shape.heads, shape.window = queries.shape[2], window or 0
        queries, keys, values = queries.contiguous(), keys.contiguous(), values.float().contiguous()
        out = queries.new_empty(shape.streams, *queries.shape[1:])
        status = self._attend(
            self._sequences.data_ptr(),
            len(self._sequences),
            ctypes.byref(shape),
            layer,
            queries.shape[3],
            *(tensor.data_ptr() for tensor in (queries, keys, values, out)),
        )
        if status == NO_CODE:
            raise ValueError(f"no kernel for heads of {queries.shape[3]}: not one of {HEAD_DIMS}")
        if status == NO_MEMORY:
            raise MemoryError(f"no memory for the attention scores of {shape.rows} tokens")
        return out


def available(head_dim: int) -> bool:
    """Whether it can be used here for heads of that size."""
    return head_dim in HEAD_DIMS and compiled.available()


@functools.cache
def _function():
    function = compiled.library().agd_cached_attention
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [pointer, number, ctypes.POINTER(_Shape), number, number, *[pointer] * 4]
    return function
