"""Softmax attention of paged sequences and of one tangent of each on a CPU: one call for one layer of a mixed batch.

Values and tangents are stacked along the tokens: rows [0, N) are values, rows [N, 2 N) their tangents. The twin in
PyTorch, with the same `attend`, is `agd_vllm.attribution.paged_twin`.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch

from agd_vllm.kernels import compiled

HEAD_DIMS = (16, 32, 64, 96, 128, 256)
NO_CODE, NO_MEMORY = 1, 2
DTYPES = (torch.bfloat16, torch.float32)
MADV_HUGEPAGE = 14
PAGE_BYTES = 4096


class _Batch(ctypes.Structure):
    _fields_ = [
        ("sequences", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_sequences", "rows")),
        *((name, ctypes.c_void_p) for name in ("slots", "positions")),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "dim", "window")),
        *((name, ctypes.c_void_p) for name in ("rope", "query_gain", "key_gain")),
        *((name, ctypes.c_float) for name in ("scale", "eps", "score_factor", "value_factor")),
        ("through_norm", ctypes.c_int64),
    ]


class _Cache(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("half", "block_size", "block", "head", "plane", "token")),
    ]


class _Call(ctypes.Structure):
    _fields_ = [
        ("batch", ctypes.POINTER(_Batch)),
        ("layer", ctypes.POINTER(_Layer)),
        ("cache", ctypes.POINTER(_Cache)),
        *((name, ctypes.c_void_p) for name in ("mask", "qkv", "out")),
        ("half", ctypes.c_int64),
    ]


class PagedBatch:
    """The new tokens of one step, of N rows: those of each sequence follow one another, sequence by sequence; what is
    left at the end is padding, whose attention is 0.

    `block_table` int32 [R, P]: the blocks of each sequence. `lengths` and `counts` int64 [R]: tokens in the cache
    before this step, and new ones. `slots` int64 [N]: where a token's keys and values go, block * block size + offset;
    -1: nowhere. `positions` int64 [N]. `heads` float32 [layers, N, H]: the part of a token's head that is a component
    of its region, on top of what its inputs are: o' += heads * o; None: no head is.
    """

    def __init__(
        self,
        block_table: torch.Tensor,
        lengths: torch.Tensor,
        counts: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        heads: torch.Tensor | None = None,
    ):
        if block_table.dtype != torch.int32 or block_table.stride(1) != 1:
            raise ValueError("the blocks of a sequence must lie side by side, as int32")
        for tensor in (slots, positions):
            if tensor.dtype != torch.int64 or not tensor.is_contiguous():
                raise ValueError("slots and positions must be contiguous int64")
        if heads is not None and (heads.dtype != torch.float32 or not heads.is_contiguous()):
            raise ValueError("parts of heads must be contiguous float32")
        self.block_table, self.lengths, self.counts = block_table, lengths, counts
        self.slots, self.positions, self.heads = slots, positions, heads
        pages = block_table.data_ptr() + torch.arange(len(counts)) * (4 * block_table.stride(0))
        self._sequences = torch.stack((pages, lengths, counts, counts.cumsum(0) - counts), 1)
        self.struct = _Batch(
            self._sequences.data_ptr(), len(counts), len(slots), slots.data_ptr(), positions.data_ptr()
        )


@dataclass(frozen=True, eq=False)
class PagedLayer:
    """The attention of one layer, by one rule.

    Queries times keys times `scale` are the scores, of the last `window` positions, the query's own included (None: of
    all). `rope` float32 [positions, D]: cosines, then sines, of the halves that are rotated into each other. Where
    there are `query_gain` and `key_gain` float32 [D], heads are normed before, with `eps`; `through_norm`,
    `score_factor` and `value_factor` (f and h) are the rule's. With f = 0 keys have no tangent.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: torch.Tensor
    score_factor: float
    value_factor: float
    window: int | None = None
    query_gain: torch.Tensor | None = None
    key_gain: torch.Tensor | None = None
    eps: float = 0.0
    through_norm: bool = False

    def __post_init__(self):
        shapes = ((self.rope, (len(self.rope), self.head_dim)), *((g, (self.head_dim,)) for g in self._gains()))
        for tensor, shape in shapes:
            if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.shape != shape:
                raise ValueError(f"must be contiguous float32 {shape}, not {tensor.dtype}, {tuple(tensor.shape)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} heads cannot share {self.num_kv_heads} heads of keys and values")

    def _gains(self) -> list[torch.Tensor]:
        return [gain for gain in (self.query_gain, self.key_gain) if gain is not None]

    @property
    def planes(self) -> int:
        """Of the cache: k, k', v, v'; or k, v, v'."""
        return 4 if self.score_factor else 3

    @functools.cached_property
    def struct(self) -> _Layer:
        return _Layer(
            heads=self.num_heads,
            kv_heads=self.num_kv_heads,
            dim=self.head_dim,
            window=self.window or 0,
            rope=self.rope.data_ptr(),
            query_gain=_pointer(self.query_gain),
            key_gain=_pointer(self.key_gain),
            scale=self.scale,
            eps=self.eps,
            score_factor=self.score_factor,
            value_factor=self.value_factor,
            through_norm=self.through_norm,
        )


def attend(layer: PagedLayer, batch: PagedBatch, index: int, cache: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
    """Norms and rotates queries and keys, adds keys and values to the cache, and attends.

    `cache` [blocks, K, planes, block size, D] of any strides but the last, bfloat16 or float32, blocks of a multiple
    of 16 tokens; `qkv` [2 N, (H + 2 K) D], contiguous, bfloat16 or float32. Gives [2 N, H D] in the dtype of qkv;
    everything in between is float32. `index`: the layer's, in the batch's `heads`. A sequence gets the same bits
    whatever is beside it, on any number of threads. Only where `available`.
    """
    check_call(layer, batch, cache, qkv)
    out = qkv.new_empty(len(qkv), layer.num_heads * layer.head_dim)
    strides = cache.stride()
    paged = _Cache(cache.data_ptr(), cache.dtype == torch.bfloat16, cache.shape[3], *strides[:4])
    call = _Call(
        ctypes.pointer(batch.struct),
        ctypes.pointer(layer.struct),
        ctypes.pointer(paged),
        None if batch.heads is None else batch.heads[index].data_ptr(),
        qkv.data_ptr(),
        out.data_ptr(),
        qkv.dtype == torch.bfloat16,
    )
    status = _function()(ctypes.byref(call))
    if status == NO_CODE:
        raise ValueError(f"no kernel for heads of {layer.head_dim}: not one of {HEAD_DIMS}")
    if status == NO_MEMORY:
        raise MemoryError(f"no memory for the attention of {len(batch.slots)} tokens")
    return out


def check_call(layer: PagedLayer, batch: PagedBatch, cache: torch.Tensor, qkv: torch.Tensor) -> None:
    """Raises ValueError for tensors of `attend` that do not fit."""
    num_rows = len(batch.slots)
    check_tensors(layer, num_rows, cache, qkv)
    if batch.heads is not None and batch.heads.shape[1:] != (num_rows, layer.num_heads):
        raise ValueError(f"parts of heads must be of {num_rows} tokens: {tuple(batch.heads.shape)}")


def check_tensors(layer: PagedLayer, num_rows: int, cache: torch.Tensor, qkv: torch.Tensor) -> None:
    """Raises ValueError for a cache, or queries, keys and values of so many rows, that do not fit."""
    block_size, dim = cache.shape[3], layer.head_dim
    if cache.shape[1:] != (layer.num_kv_heads, layer.planes, block_size, dim) or cache.stride(4) != 1:
        raise ValueError(f"no cache of this layer: {tuple(cache.shape)}, {cache.stride()}")
    if block_size % 16:
        raise ValueError(f"blocks of {block_size} tokens are no multiple of 16")
    if cache.dtype not in DTYPES or qkv.dtype not in DTYPES:
        raise ValueError(f"must be bfloat16 or float32, not {cache.dtype} and {qkv.dtype}")
    if qkv.shape != (2 * num_rows, (layer.num_heads + 2 * layer.num_kv_heads) * dim) or not qkv.is_contiguous():
        raise ValueError(f"queries, keys and values must be contiguous, of {num_rows} tokens: {tuple(qkv.shape)}")


def available(head_dim: int) -> bool:
    """Whether it can be used here for heads of that size."""
    return head_dim in HEAD_DIMS and compiled.available()


def large_pages(tensor: torch.Tensor) -> None:
    """Asks the kernel of the operating system for large pages (Linux: madvise), before the memory is first touched:
    a cache is read all over, and small pages then cost more to find than to read."""
    storage = tensor.untyped_storage()
    begin = -(-storage.data_ptr() // PAGE_BYTES) * PAGE_BYTES
    end = (storage.data_ptr() + storage.nbytes()) // PAGE_BYTES * PAGE_BYTES
    if end > begin and hasattr(libc := ctypes.CDLL(None), "madvise"):
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_HUGEPAGE)


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def _function():
    function = compiled.library().agd_paged_attention
    function.argtypes = [ctypes.POINTER(_Call)]
    return function
