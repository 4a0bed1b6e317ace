"""Random paged sequences with their next queries, keys and values: what kernels of paged attention are compared on."""

from dataclasses import dataclass, replace

import torch

from agd_vllm.attribution.rules import RULES
from agd_vllm.kernels import paged_attention
from agd_vllm.kernels.paged_attention import PagedBatch, PagedLayer

MAX_POSITIONS = 4096
F32, BF16 = torch.float32, torch.bfloat16


@dataclass
class Case:
    layer: PagedLayer
    batch: PagedBatch
    cache: torch.Tensor
    qkv: torch.Tensor

    def attend(self, attend=paged_attention.attend) -> tuple[torch.Tensor, torch.Tensor]:
        """The attention and the cache as it is then; the case's own is left alone."""
        view = self.cache.storage_offset(), self.cache.shape, self.cache.stride()
        cache = torch.empty(0, dtype=self.cache.dtype).set_(self.cache.untyped_storage().clone(), *view)
        return attend(self.layer, self.batch, 1, cache, self.qkv), cache


def make_layer(rule="attnlrp", kv_heads=1, group=1, head_dim=64, window=None, norms=False) -> PagedLayer:
    angles = torch.arange(MAX_POSITIONS)[:, None] / 100 ** (torch.arange(head_dim // 2) / (head_dim // 2))
    gains = {"query_gain": torch.randn(head_dim), "key_gain": torch.randn(head_dim), "eps": 1e-6} if norms else {}
    return PagedLayer(
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=torch.cat((angles.cos(), angles.sin()), -1),
        score_factor=RULES[rule].scores,
        value_factor=RULES[rule].values,
        through_norm=RULES[rule].through_norm,
        window=window,
        **gains,
    )


def empty_cache(blocks: int, layer: PagedLayer, block_size: int, strides: str, dtype: torch.dtype) -> torch.Tensor:
    """A cache with nothing but NaN in it: contiguous, one layer of several, or with the tokens of a block first."""
    heads, planes, dim = layer.num_kv_heads, layer.planes, layer.head_dim
    if strides == "tokens first":
        cache = torch.empty(blocks, block_size, heads, planes, dim, dtype=dtype).permute(0, 2, 3, 1, 4)
    elif strides == "one of several":
        cache = torch.empty(blocks, 3, heads, planes, block_size, dim, dtype=dtype)[:, 1]
    else:
        cache = torch.empty(blocks, heads, planes, block_size, dim, dtype=dtype)
    cache.fill_(float("nan"))
    return cache


def make_case(
    layer: PagedLayer,
    sequences,
    block_size=16,
    strides="contiguous",
    dtype=F32,
    cache_dtype=None,
    padding=0,
    heads=False,
) -> Case:
    """Sequences of these (length, count), their caches with random content up to the length and NaN beyond."""
    lengths, counts = (torch.tensor(column) for column in zip(*sequences, strict=True))
    pages = [-(-(length + count) // block_size) for length, count in sequences]
    # The table is wider than it must be, and of blocks in any order.
    table = torch.zeros(len(sequences), max(pages) + 3, dtype=torch.int32)[:, : max(pages)]
    order = torch.randperm(sum(pages) + 2).int()
    cache = empty_cache(len(order), layer, block_size, strides, cache_dtype or dtype)
    slots, positions = [], []
    for i, (length, count) in enumerate(sequences):
        table[i, : pages[i]], order = order[: pages[i]], order[pages[i] :]
        places = torch.arange(length + count)
        slot = table[i, places // block_size].long() * block_size + places % block_size
        held = slot[:length]
        cache[held // block_size, :, :, held % block_size] = torch.randn(
            length, layer.num_kv_heads, layer.planes, layer.head_dim
        ).to(cache.dtype)
        slots.append(slot[length:])
        positions.append(places[length:])
        if layer.window:
            # Blocks before the window are another's by now.
            table[i, : max(0, length + 1 - layer.window) // block_size] = order[-1]
    rows = int(counts.sum()) + padding
    slots = torch.cat((*slots, torch.full((padding,), -1)))
    positions = torch.cat((*positions, torch.zeros(padding, dtype=torch.int64)))
    parts = torch.rand(2, rows, layer.num_heads).round() if heads else None
    qkv = torch.randn(2 * rows, (layer.num_heads + 2 * layer.num_kv_heads) * layer.head_dim).mul(2).to(dtype)
    qkv.view(2, rows, -1)[:, rows - padding :] = float("nan")
    return Case(layer, PagedBatch(table, lengths, counts, slots, positions, parts), cache, qkv)


def make_offset_case(deviations: float, window: int | None, sequences=((60, 1), (17, 1), (13, 30))) -> Case:
    """A bfloat16 cache; the tangents of a query's scores share an offset of so many of their standard deviations.

    Queries and keys are not rotated, and all inputs are bfloat16 numbers, so that no implementation rounds them.
    """
    layer = make_layer(group=2, window=window)
    layer.rope[:, :32], layer.rope[:, 32:] = 1, 0
    case = make_case(layer, sequences, dtype=F32, cache_dtype=BF16)
    heads = case.qkv.view(2, len(case.batch.slots), -1, layer.head_dim)
    # A query's 8 times 3 is one standard deviation of the scores' tangents.
    heads[0, :, : layer.num_heads, 0] = 8
    heads[1, :, layer.num_heads : -layer.num_kv_heads, 0] += 3 * deviations
    case.cache[:, :, 1, :, 0] += 3 * deviations
    return replace(case, qkv=case.qkv.bfloat16().float())


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Of the tangents of an attention, all together."""
    difference, tangent = (ours - theirs).chunk(2)[1], theirs.chunk(2)[1]
    return float(difference.norm() / tangent.norm())


def gpu_batch(case: Case, mixed: bool = False):
    """The same batch as the kernels of a GPU take it; sequences of one token come first in it, unless it is `mixed`."""
    from agd_vllm.kernels.paged_attention_gpu import GpuBatch

    batch, rows = case.batch, len(case.batch.slots)
    counts = batch.counts.tolist()
    sets, set_of = torch.zeros(1, 2, case.layer.num_heads), torch.full((rows,), -1, dtype=torch.int32)
    if batch.heads is not None:
        sets, set_of = batch.heads.transpose(0, 1).contiguous(), torch.arange(rows, dtype=torch.int32)
    starts = torch.tensor([0, *batch.counts.cumsum(0).tolist()], dtype=torch.int32)
    ends = (batch.lengths + batch.counts).int()
    singles = next((i for i, count in enumerate(counts) if count > 1), len(counts))
    table = batch.block_table
    if mixed:
        # As many sequences as rows, of which those at the end have no token; what stands there is another batch's.
        missing = rows - len(ends)
        starts = torch.cat((starts, starts[-1:].repeat(missing)))
        ends, table = torch.cat((ends, ends[:1].repeat(missing))), torch.cat((table, table[:1].repeat(missing, 1)))
        singles = None
    return GpuBatch(table, starts, ends, batch.slots, batch.positions, sets, set_of, singles)
