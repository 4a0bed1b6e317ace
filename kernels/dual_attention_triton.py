"""The kernels of `dual_attention`: values and tangents together.

One pass over K, V, K', V' in the manner of FlashAttention (arXiv 2205.14135), nothing of size T x T: with
p = exp(s - m) for the running maximum m of the scores s, and c = (f / h) p s' for a tangent, each query carries the
numbers l = sum p and sum c and the rows sum p v and sum (p v' + c v), all of them rescaled when m grows. In the end

    o = sum p v / l,    o' = h (sum (p v' + c v) / l - (sum c / l) o)

which is `rules.attention`: o' = h a v' + f a (s' - sum a s') v.
"""

import triton
import triton.language as tl


@triton.jit
def _sequence(sequences, index, TYPE: tl.constexpr):
    """Keys, values, capacity, length, count and first row of a sequence: its line in the table."""
    line = sequences + index * 6
    # Allocated by torch, whose memory is aligned to more than that.
    keys = tl.multiple_of(tl.load(line).to(tl.pointer_type(TYPE)), 16)
    values = tl.multiple_of(tl.load(line + 1).to(tl.pointer_type(TYPE)), 16)
    length, count = tl.load(line + 3).to(tl.int32), tl.load(line + 4).to(tl.int32)
    return keys, values, tl.load(line + 2), length, count, tl.load(line + 5)


@triton.jit(do_not_specialize=["layer", "rows", "streams", "key_streams"])
def append(
    sequences,
    tokens,
    keys,
    values,
    layer,
    rows,
    streams,
    key_streams,
    TYPE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The new keys and values of one token and key-value head, all streams, into its sequence's cache."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index, number = tl.load(tokens + 2 * row), tl.load(tokens + 2 * row + 1)
    cached_keys, cached_values, capacity, length, _count, _first = _sequence(sequences, index, TYPE)
    kv_heads = tl.num_programs(1)
    columns = tl.arange(0, BLOCK_D)
    there = columns < D
    plane = tl.cast(layer, tl.int64) * kv_heads + head
    for stream in range(streams):
        source = ((stream * rows + row) * kv_heads + head) * D + columns
        value = tl.load(values + source, mask=there)
        to = ((plane * streams + stream) * capacity + length + number) * D + columns
        tl.store(cached_values + to, value.to(TYPE), mask=there)
        if stream < key_streams:
            key = tl.load(keys + source, mask=there)
            to = ((plane * key_streams + stream) * capacity + length + number) * D + columns
            tl.store(cached_keys + to, key.to(TYPE), mask=there)


@triton.jit
def _dot(a, b, to, INTERPRETED: tl.constexpr):
    """`to` + a b. Triton's interpreter cannot multiply bfloat16: both become float32, which is what a GPU adds in."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, to, input_precision="ieee")


@triton.jit
def _rows(start, positions, end, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Cached rows [positions, BLOCK_D]; 0 from `end` on and beyond D."""
    columns = tl.arange(0, BLOCK_D)
    at = start + positions[:, None] * D + columns[None, :]
    if BLOCK_D != D:
        return tl.load(at, mask=(positions < end)[:, None] & (columns < D)[None, :], other=0.0)
    if MASKED:
        return tl.load(at, mask=(positions < end)[:, None], other=0.0)
    return tl.load(at)


@triton.jit
def _over_keys(
    first,
    last,
    position,
    window,
    q,
    q_tangent,
    keys,
    key_tangents,
    values,
    value_tangents,
    ratio,
    m,
    total,
    total_c,
    sum_v,
    sum_t,
    MASKED: tl.constexpr,
    KEY_TANGENTS: tl.constexpr,
    KEYS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TYPE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Carries the sums of a tile's queries over the keys [first, last). MASKED: not every query sees all of them."""
    ROWS: tl.constexpr = q.shape[0]
    nothing = tl.zeros([ROWS, KEYS], tl.float32)
    for start in range(first, last, KEYS):
        at = start + tl.arange(0, KEYS)
        k = _rows(keys, at, last, MASKED, D, BLOCK_D)
        scores = _dot(q, tl.trans(k), nothing, INTERPRETED)
        if MASKED:
            seen = (at[None, :] <= position[:, None]) & (at[None, :] > position[:, None] - window)
            scores = tl.where(seen & (at < last)[None, :], scores, float("-inf"))
        highest = tl.maximum(m, tl.max(scores, 1))
        # A query that has seen no key yet.
        base = tl.where(highest == float("-inf"), 0.0, highest)
        shrink = tl.exp(m - base)
        p = tl.exp(scores - base[:, None])
        m = highest
        total = total * shrink + tl.sum(p, 1)
        v = _rows(values, at, last, MASKED, D, BLOCK_D)
        v_tangent = _rows(value_tangents, at, last, MASKED, D, BLOCK_D)
        weights = p.to(TYPE)
        sum_v = _dot(weights, v, sum_v * shrink[:, None], INTERPRETED)
        sum_t = _dot(weights, v_tangent, sum_t * shrink[:, None], INTERPRETED)
        if KEY_TANGENTS:
            k_tangent = _rows(key_tangents, at, last, MASKED, D, BLOCK_D)
            change = _dot(q, tl.trans(k_tangent), _dot(q_tangent, tl.trans(k), nothing, INTERPRETED), INTERPRETED)
            c = p * change * ratio
            total_c = total_c * shrink + tl.sum(c, 1)
            sum_t = _dot(c.to(TYPE), v, sum_t, INTERPRETED)
    return m, total, total_c, sum_v, sum_t


# A number that happens to be 1 or a multiple of 16 is no reason to compile it again.
@triton.jit(do_not_specialize=["layer", "rows", "heads", "group", "tangents", "window"])
def attend(
    sequences,
    tiles,
    queries,
    out,
    sums,
    numbers,
    layer,
    rows,
    heads,
    group,
    tangents,
    window,
    ratio,
    value_factor,
    KEY_TANGENTS: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TYPE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of queries, the heads of one group side by side, with one tangent over one split of its keys."""
    tile, split = tl.program_id(0), tl.program_id(2)
    kv_head, tangent = tl.program_id(1) // tangents, tl.program_id(1) % tangents
    index, start = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1).to(tl.int32)
    keys, values, capacity, length, count, first_row = _sequence(sequences, index, TYPE)
    end = length + tl.minimum(start + ROWS // group, count)

    lane = tl.arange(0, ROWS)
    token = start + lane // group
    position = length + token
    there = position < end
    columns = tl.arange(0, BLOCK_D)
    row = (first_row + token) * heads + kv_head * group + lane % group
    at = row[:, None] * D + columns[None, :]
    loaded = there[:, None] & (columns < D)[None, :]
    stream = tl.cast(rows, tl.int64) * heads * D
    q = tl.load(queries + at, mask=loaded, other=0.0).to(TYPE)
    plane = (tl.cast(layer, tl.int64) * (heads // group) + kv_head) * capacity * D
    values += plane * (tangents + 1)
    value_tangents = values + (1 + tangent) * capacity * D
    if KEY_TANGENTS:
        q_tangent = tl.load(queries + (1 + tangent) * stream + at, mask=loaded, other=0.0).to(TYPE)
        keys += plane * (tangents + 1)
        key_tangents = keys + (1 + tangent) * capacity * D
    else:
        q_tangent = q
        keys += plane
        key_tangents = keys

    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    total_c = tl.zeros([ROWS], tl.float32)
    sum_v = tl.zeros([ROWS, BLOCK_D], tl.float32)
    sum_t = tl.zeros([ROWS, BLOCK_D], tl.float32)
    # Whole blocks of keys for each split; what the first query sees is seen by all, but for a window.
    lowest = tl.maximum(length + start + 1 - window, 0) // KEYS * KEYS
    share = tl.cdiv(tl.cdiv(end - lowest, KEYS), tl.num_programs(2)) * KEYS
    first = lowest + split * share
    last = tl.minimum(first + share, end)
    if not WINDOW:
        whole = tl.minimum(last, (length + start + 1) // KEYS * KEYS)
        m, total, total_c, sum_v, sum_t = _over_keys(
            first, whole, position, window, q, q_tangent, keys, key_tangents, values, value_tangents, ratio,
            m, total, total_c, sum_v, sum_t, False, KEY_TANGENTS, KEYS, INTERPRETED, TYPE, D, BLOCK_D,
        )  # fmt: skip
        first = tl.maximum(first, whole)
    m, total, total_c, sum_v, sum_t = _over_keys(
        first, last, position, window, q, q_tangent, keys, key_tangents, values, value_tangents, ratio,
        m, total, total_c, sum_v, sum_t, True, KEY_TANGENTS, KEYS, INTERPRETED, TYPE, D, BLOCK_D,
    )  # fmt: skip

    if SPLIT:
        part = (split * tangents + tangent).to(tl.int64) * rows * heads + row
        to = sums + part[:, None] * (2 * D) + columns[None, :]
        tl.store(to, sum_v, mask=loaded)
        tl.store(to + D, sum_t, mask=loaded)
        tl.store(numbers + 3 * part, total, mask=there)
        tl.store(numbers + 3 * part + 1, total_c, mask=there)
        tl.store(numbers + 3 * part + 2, m, mask=there)
    else:
        value = sum_v / total[:, None]
        if tangent == 0:
            tl.store(out + at, value, mask=loaded)
        change = value_factor * (sum_t - total_c[:, None] * value) / total[:, None]
        tl.store(out + (1 + tangent) * stream + at, change, mask=loaded)


@triton.jit(do_not_specialize=["tokens", "rows", "splits"])
def combine(
    sequences,
    tiles,
    tokens,
    sums,
    numbers,
    out,
    rows,
    splits,
    value_factor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One query with one tangent from what its splits have summed up."""
    tile, head, tangent = tl.program_id(0) // tokens, tl.program_id(1), tl.program_id(2)
    heads, tangents = tl.num_programs(1), tl.num_programs(2)
    line = sequences + tl.load(tiles + 2 * tile) * 6
    token = tl.load(tiles + 2 * tile + 1) + tl.program_id(0) % tokens
    if token < tl.load(line + 4):
        row = (tl.load(line + 5) + token) * heads + head
        columns = tl.arange(0, BLOCK_D)
        loaded = columns < D
        sum_v, sum_t = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
        m, total, total_c = float("-inf"), 0.0, 0.0
        for split in range(splits):
            part = (split * tangents + tangent).to(tl.int64) * rows * heads + row
            its_m = tl.load(numbers + 3 * part + 2)
            highest = tl.maximum(m, its_m)
            base = tl.where(highest == float("-inf"), 0.0, highest)
            mine, its = tl.exp(m - base), tl.exp(its_m - base)
            m = highest
            total = total * mine + tl.load(numbers + 3 * part) * its
            total_c = total_c * mine + tl.load(numbers + 3 * part + 1) * its
            of = sums + part * (2 * D) + columns
            sum_v = sum_v * mine + tl.load(of, mask=loaded, other=0.0) * its
            sum_t = sum_t * mine + tl.load(of + D, mask=loaded, other=0.0) * its
        value = sum_v / total
        at = row * D + columns
        if tangent == 0:
            tl.store(out + at, value, mask=loaded)
        change = value_factor * (sum_t - total_c * value) / total
        tl.store(out + (1 + tangent) * tl.cast(rows, tl.int64) * heads * D + at, change, mask=loaded)
