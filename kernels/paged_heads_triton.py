"""What comes before the attention of `paged_attention_gpu`: queries and keys of a step are normed and rotated, keys and
values kept in their pages, values and tangents together. The rules stand in `agd_vllm.attribution.rules`."""

import triton
import triton.language as tl


# A number that happens to be 1 or a multiple of 16 is no reason to compile it again.
@triton.jit(do_not_specialize=["rows", "heads"])
def prepare(
    qkv,
    slots,
    positions,
    rope,
    query_gain,
    key_gain,
    queries,
    cache,
    rows,
    heads,
    scale,
    eps,
    of_block,
    of_head,
    of_plane,
    of_token,
    SIZE: tl.constexpr,
    NORMED: tl.constexpr,
    THROUGH_NORM: tl.constexpr,
    STREAMS: tl.constexpr,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    TYPE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token and one group of heads: norms and rotates its queries and its key, keeps key and value in the cache.

    STREAMS of queries and keys: 2, or 1 where scores have no tangent. MEMBERS: a power of two above GROUP.
    """
    row, kv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kv_heads = tl.num_programs(1)
    slot = tl.load(slots + row)
    block, offset = slot // SIZE, slot % SIZE
    kept = cache + block * of_block + kv * of_head + offset * of_token
    member, column = tl.arange(0, MEMBERS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    known = column < D
    is_query, is_key = (member < GROUP) & known, (member == GROUP) & known
    head = tl.where(member == GROUP, heads + kv, kv * GROUP + member)
    there = is_query | is_key
    middle: tl.constexpr = D // 2
    partner = tl.where(column < middle, column + middle, column - middle)
    table = rope + tl.load(positions + row) * D + column % middle
    cosine = tl.load(table, mask=known, other=0.0)
    sine = tl.where(column < middle, -1.0, 1.0) * tl.load(table + middle, mask=known, other=0.0)
    factor = tl.where(member == GROUP, 1.0, scale)
    width = (heads + 2 * kv_heads) * D
    line = qkv + row * width + head * D
    x = tl.load(line + column, mask=there, other=0.0).to(tl.float32)
    y, y_other = x, tl.load(line + partner, mask=there, other=0.0).to(tl.float32)
    if NORMED:
        shrink = 1 / tl.sqrt_rn(tl.sum(x * x, 1) / D + eps)[:, None]
        gain, gain_other = _gains(query_gain, key_gain, is_query, is_key, column, partner)
        x_other = y_other
        y, y_other = gain * x * shrink, gain_other * y_other * shrink
    _store_heads(
        y * cosine + y_other * sine, factor, 0, queries, kept, row, rows, slot, head, heads, of_plane, is_query,
        is_key, column, TYPE, D,
    )  # fmt: skip
    if STREAMS > 1:
        line += tl.cast(rows, tl.int64) * width
        t = tl.load(line + column, mask=there, other=0.0).to(tl.float32)
        t_other = tl.load(line + partner, mask=there, other=0.0).to(tl.float32)
        if NORMED:
            if THROUGH_NORM:
                along = tl.sum(x * t, 1)[:, None] / D * shrink * shrink
                t, t_other = t - x * along, t_other - x_other * along
            t, t_other = gain * t * shrink, gain_other * t_other * shrink
        _store_heads(
            t * cosine + t_other * sine, factor, 1, queries, kept, row, rows, slot, head, heads, of_plane, is_query,
            is_key, column, TYPE, D,
        )  # fmt: skip
    if slot >= 0:
        columns = tl.arange(0, BLOCK_D)
        value = qkv + row * width + (heads + kv_heads + kv) * D + columns
        for stream in tl.static_range(2):
            moved = tl.load(value + stream * tl.cast(rows, tl.int64) * width, mask=columns < D, other=0.0)
            tl.store(kept + (STREAMS + stream) * of_plane + columns, moved.to(TYPE), mask=columns < D)


@triton.jit
def _gains(query_gain, key_gain, is_query, is_key, column, partner):
    """The gain of each member's norm [MEMBERS, D], and that of the other half."""
    gain = tl.load(query_gain + column, mask=is_query, other=0.0)
    gain += tl.load(key_gain + column, mask=is_key, other=0.0)
    other = tl.load(query_gain + partner, mask=is_query, other=0.0)
    return gain, other + tl.load(key_gain + partner, mask=is_key, other=0.0)


@triton.jit
def _store_heads(
    rotated, factor, STREAM: tl.constexpr, queries, kept, row, rows, slot, head, heads, of_plane, is_query, is_key,
    column, TYPE: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The queries of a group to `queries` [streams, rows, H, D], the key to its plane of the cache."""
    moved = (rotated * factor).to(TYPE)
    to = queries + ((STREAM * tl.cast(rows, tl.int64) + row) * heads + head) * D + column
    tl.store(to, moved, mask=is_query)
    if slot >= 0:
        key = tl.broadcast_to(kept + STREAM * of_plane + column, moved.shape)
        tl.store(key, moved, mask=is_key)
