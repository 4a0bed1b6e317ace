"""The kernels of `paged_attention_gpu`: values and tangents together, in pages of a cache.

One pass over K, V, K', V' in the manner of FlashAttention (arXiv 2205.14135): with p = exp(s - m) for the running
maximum m of the scores s and t = (f / h) s' for the tangent, each query carries the numbers l = sum p and r and the
rows sum p v and sum (p v' + c v) with c = p (t - r), all but r rescaled when m grows. In the end, for any r,

    o = sum p v / l,    o' = h (sum (p v' + c v) / l - (sum c / l) o)

which is `rules.attention`: o' = h a v' + f a (s' - sum a s') v. A head of the region is a component itself: o' += o.
r is the mean of t under p so far: sum c is 0, and no offset of all t is in c when it is rounded for its product with v.
Grids and addresses depend on the size of a batch only, never on the lengths of its sequences, so that a CUDA graph of
them holds for every batch of that size.
"""

import triton
import triton.language as tl


@triton.jit
def _dot(a, b, to, INTERPRETED: tl.constexpr):
    """`to` + a b. Triton's interpreter cannot multiply bfloat16: both become float32, which is what a GPU adds in."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, to, input_precision="ieee")


@triton.jit
def _rows(at, seen, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Cached rows [keys, BLOCK_D] that begin at `at`; 0 where not `seen` and beyond D."""
    columns = tl.arange(0, BLOCK_D)
    if BLOCK_D != D:
        return tl.load(at[:, None] + columns[None, :], mask=seen[:, None] & (columns < D)[None, :], other=0.0)
    if MASKED:
        return tl.load(at[:, None] + columns[None, :], mask=seen[:, None], other=0.0)
    return tl.load(at[:, None] + columns[None, :])


@triton.jit
def _over_keys(
    first,
    last,
    oldest,
    position,
    window,
    q,
    q_tangent,
    cache,
    pages,
    of_block,
    of_plane,
    of_token,
    ratio,
    m,
    total,
    mean,
    sum_v,
    sum_t,
    MASKED: tl.constexpr,
    STREAMS: tl.constexpr,
    SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TYPE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Carries the sums of a tile's queries over the keys [first, last), of which those before `oldest` may be of pages
    that are another's by now. MASKED: not every query sees all of them."""
    ROWS: tl.constexpr = q.shape[0]
    nothing = tl.zeros([ROWS, KEYS], tl.float32)
    for start in range(first, last, KEYS):
        at = start + tl.arange(0, KEYS)
        known = (at < last) & (at >= oldest)
        if MASKED:
            block = tl.load(pages + at // SIZE, mask=known, other=0).to(tl.int64)
        else:
            block = tl.load(pages + at // SIZE).to(tl.int64)
        keys = cache + block * of_block + (at % SIZE) * of_token
        k = _rows(keys, known, MASKED, D, BLOCK_D)
        scores = _dot(q, tl.trans(k), nothing, INTERPRETED)
        if MASKED:
            seen = (at[None, :] <= position[:, None]) & (at[None, :] > position[:, None] - window)
            scores = tl.where(seen & known[None, :], scores, float("-inf"))
        highest = tl.maximum(m, tl.max(scores, 1))
        # A query that has seen no key yet.
        base = tl.where(highest == float("-inf"), 0.0, highest)
        shrink = tl.exp(m - base)
        p = tl.exp(scores - base[:, None])
        m = highest
        total = total * shrink + tl.sum(p, 1)
        v = _rows(keys + STREAMS * of_plane, known, MASKED, D, BLOCK_D)
        v_tangent = _rows(keys + (STREAMS + 1) * of_plane, known, MASKED, D, BLOCK_D)
        sum_v, sum_t = sum_v * shrink[:, None], sum_t * shrink[:, None]
        if STREAMS > 1:
            k_tangent = _rows(keys + of_plane, known, MASKED, D, BLOCK_D)
            change = _dot(q, tl.trans(k_tangent), _dot(q_tangent, tl.trans(k), nothing, INTERPRETED), INTERPRETED)
            change = change * ratio - mean[:, None]
            # Where a key has been seen, `total` is 1 at least: the highest score's p.
            step = tl.sum(p * change, 1) / tl.maximum(total, 1.0)
            mean += step
            sum_t -= step[:, None] * sum_v
            sum_t = _dot((p * (change - step[:, None])).to(TYPE), v, sum_t, INTERPRETED)
        weights = p.to(TYPE)
        sum_v = _dot(weights, v, sum_v, INTERPRETED)
        sum_t = _dot(weights, v_tangent, sum_t, INTERPRETED)
    return m, total, mean, sum_v, sum_t


@triton.jit
def _place(
    tile, starts, first_sequence, sequences, TOKENS: tl.constexpr, SINGLE: tl.constexpr, MIXED: tl.constexpr
):  # fmt: skip
    """Sequence of a tile, its first token and where its sequence's end, both in the batch; nothing lies between these
    where the other launch of a MIXED batch has the sequence.

    SINGLE: a tile is a sequence. Else those of the i-th of the `sequences` begin at tile (its first token) // TOKENS
    + i, and the last one whose tiles begin at or before this one is looked for.
    """
    if SINGLE:
        sequence = first_sequence + tile
        first = tl.load(starts + sequence)
        begin = first
    else:
        base = tl.load(starts + first_sequence)
        low, high = tile * 0, tile * 0 + sequences
        while low + 1 < high:
            middle = (low + high) // 2
            if (tl.load(starts + first_sequence + middle) - base) // TOKENS + middle <= tile:
                low = middle
            else:
                high = middle
        sequence = first_sequence + low
        first = tl.load(starts + sequence)
        begin = first + (tile - (first - base) // TOKENS - low) * TOKENS
    stop = tl.load(starts + sequence + 1)
    if MIXED:
        mine = stop - first == 1 if SINGLE else stop - first > 1
        stop = tl.where(mine, stop, begin)
    return sequence, begin, stop


@triton.jit
def _component(sets, set_of, row, head, of_set, there):
    """How far a head is a component of its token's region."""
    number = tl.load(set_of + row, mask=there, other=-1)
    return tl.load(sets + number.to(tl.int64) * of_set + head, mask=there & (number >= 0), other=0.0)


@triton.jit(do_not_specialize=["rows", "heads", "first_sequence", "sequences", "first_row", "window", "of_set"])
def attend(
    queries,
    out,
    sums,
    numbers,
    cache,
    table,
    starts,
    ends,
    sets,
    set_of,
    rows,
    heads,
    first_sequence,
    sequences,
    first_row,
    window,
    ratio,
    value_factor,
    of_set,
    of_sequence,
    of_block,
    of_head,
    of_plane,
    of_token,
    SINGLE: tl.constexpr,
    MIXED: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    STREAMS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TYPE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of queries, the heads of one group side by side, over one split of its keys."""
    tile, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    TOKENS: tl.constexpr = ROWS // GROUP
    lane, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    head = kv * GROUP + lane % GROUP
    stream = tl.cast(rows, tl.int64) * heads * D
    sequence, begin, stop = _place(tile, starts, first_sequence, sequences, TOKENS, SINGLE, MIXED)
    if begin < stop:
        length = tl.load(ends + sequence)
        token = begin + lane // GROUP
        there = (token < stop) & (lane < TOKENS * GROUP)
        # Of each query among the keys of its sequence.
        position = length - (stop - token)
        lowest, end = length - (stop - begin), length - tl.maximum(stop - begin - TOKENS, 0)
        at = (token.to(tl.int64) * heads + head)[:, None] * D + columns[None, :]
        loaded = there[:, None] & (columns < D)[None, :]
        q = tl.load(queries + at, mask=loaded, other=0.0)
        q_tangent = q
        if STREAMS > 1:
            q_tangent = tl.load(queries + stream + at, mask=loaded, other=0.0)
        cache += kv * of_head
        pages = table + tl.cast(sequence, tl.int64) * of_sequence

        m = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        mean = tl.zeros([ROWS], tl.float32)
        sum_v = tl.zeros([ROWS, BLOCK_D], tl.float32)
        sum_t = tl.zeros([ROWS, BLOCK_D], tl.float32)
        # Whole blocks of keys for each split; what the first query sees is seen by all, but for a window.
        oldest = tl.maximum(lowest + 1 - window, 0)
        nearest = oldest // KEYS * KEYS
        share = tl.cdiv(tl.cdiv(end - nearest, KEYS), tl.num_programs(2)) * KEYS
        first = nearest + split * share
        last = tl.minimum(first + share, end)
        if not WINDOW:
            whole = tl.minimum(last, (lowest + 1) // KEYS * KEYS)
            m, total, mean, sum_v, sum_t = _over_keys(
                first, whole, oldest, position, window, q, q_tangent, cache, pages, of_block, of_plane, of_token, ratio,
                m, total, mean, sum_v, sum_t, False, STREAMS, SIZE, KEYS, INTERPRETED, TYPE, D, BLOCK_D,
            )  # fmt: skip
            first = tl.maximum(first, whole)
        m, total, mean, sum_v, sum_t = _over_keys(
            first, last, oldest, position, window, q, q_tangent, cache, pages, of_block, of_plane, of_token, ratio,
            m, total, mean, sum_v, sum_t, True, STREAMS, SIZE, KEYS, INTERPRETED, TYPE, D, BLOCK_D,
        )  # fmt: skip

        if SPLIT:
            part = ((token - first_row).to(tl.int64) * tl.num_programs(2) + split) * heads + head
            to = sums + part[:, None] * (2 * D) + columns[None, :]
            tl.store(to, sum_v, mask=loaded)
            # The mean is this split's own: what is added up over splits are the sums of r = 0.
            tl.store(to + D, sum_t + mean[:, None] * sum_v, mask=loaded)
            tl.store(numbers + 3 * part, total, mask=there)
            tl.store(numbers + 3 * part + 1, mean * total, mask=there)
            tl.store(numbers + 3 * part + 2, m, mask=there)
        else:
            value = sum_v / total[:, None]
            change = value_factor * sum_t / total[:, None]
            change += _component(sets, set_of, token, head, of_set, there)[:, None] * value
            tl.store(out + at, value.to(out.dtype.element_ty), mask=loaded)
            tl.store(out + stream + at, change.to(out.dtype.element_ty), mask=loaded)
    elif SINGLE and not SPLIT:
        # A row that pads the batch: no sequence has it.
        row = tl.cast(first_row + tile, tl.int64)
        at = (row * heads + head)[:, None] * D + columns[None, :]
        loaded = (lane < GROUP)[:, None] & (columns < D)[None, :]
        if row >= tl.load(starts + first_sequence + sequences):
            nothing = tl.zeros([ROWS, BLOCK_D], out.dtype.element_ty)
            tl.store(out + at, nothing, mask=loaded)
            tl.store(out + stream + at, nothing, mask=loaded)


@triton.jit(do_not_specialize=["rows", "first_row", "splits", "of_set", "last_sequence"])
def combine(
    sums,
    numbers,
    out,
    starts,
    sets,
    set_of,
    rows,
    first_row,
    splits,
    value_factor,
    of_set,
    last_sequence,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One query from what its splits have summed up; 0 where it pads the batch."""
    number, head = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(1)
    row = tl.cast(first_row + number, tl.int64)
    columns = tl.arange(0, BLOCK_D)
    known = columns < D
    value, change = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    if row < tl.load(starts + last_sequence):
        sum_v, sum_t = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
        m, total, total_c = float("-inf"), 0.0, 0.0
        for split in range(splits):
            part = (tl.cast(number, tl.int64) * splits + split) * heads + head
            its_m = tl.load(numbers + 3 * part + 2)
            highest = tl.maximum(m, its_m)
            base = tl.where(highest == float("-inf"), 0.0, highest)
            mine, its = tl.exp(m - base), tl.exp(its_m - base)
            m = highest
            total = total * mine + tl.load(numbers + 3 * part) * its
            total_c = total_c * mine + tl.load(numbers + 3 * part + 1) * its
            of = sums + part * (2 * D) + columns
            sum_v = sum_v * mine + tl.load(of, mask=known, other=0.0) * its
            sum_t = sum_t * mine + tl.load(of + D, mask=known, other=0.0) * its
        value = sum_v / total
        change = value_factor * (sum_t - total_c * value) / total
        change += _component(sets, set_of, row, head, of_set, row >= 0) * value
    at = (row * heads + head) * D + columns
    tl.store(out + at, value.to(out.dtype.element_ty), mask=known)
    tl.store(out + tl.cast(rows, tl.int64) * heads * D + at, change.to(out.dtype.element_ty), mask=known)
