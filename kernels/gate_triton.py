"""The gate on an NVIDIA GPU: one read of the logits. Its twin is `gate.gate_twin`.

A first kernel reads each row in chunks, a program each, and keeps of a chunk its part of the entropy, and of each tile
of TILE tokens the highest logit. A second one adds these up and decides. Candidates are looked for only in rows that
are uncertain, and then a tile is read again only for a candidate that lies in it: a token among the first k, in the
order of (logit descending, id ascending), lies in one of the first k tiles in the order of (highest logit, position).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from agd_vllm.kernels.gate_decision import GateDecision

TILE, TILES = 512, 16
MEASURE_WARPS, DECIDE_WARPS = 8, 1


def gate(
    logits: torch.Tensor,
    rows: torch.Tensor,
    tau: torch.Tensor,
    top_k: int,
    min_prob: torch.Tensor,
    pause: torch.Tensor | None,
) -> GateDecision:
    """See `agd_vllm.kernels.gate.gate`."""
    num_rows, vocab = len(rows), logits.shape[1]
    if logits.stride(1) != 1:
        raise ValueError("the logits of a row must lie side by side")

    def room(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=logits.device)

    decision = GateDecision(
        entropy=room(num_rows),
        log_sum_exp=room(num_rows),
        open=room(num_rows, dtype=torch.bool),
        candidate_ids=room(num_rows, top_k, dtype=torch.int32),
        candidate_probs=room(num_rows, top_k),
        candidate_count=room(num_rows, dtype=torch.int32),
    )
    if not num_rows:
        return decision
    num_tiles, num_chunks = triton.cdiv(vocab, TILE), triton.cdiv(vocab, TILE * TILES)
    maxima, partials = room(num_rows, num_tiles), room(num_rows, 3, num_chunks)
    _measure[num_chunks, num_rows](
        logits,
        logits.stride(0),
        rows,
        pause,
        vocab,
        maxima,
        num_tiles,
        partials,
        num_chunks,
        TILE=TILE,
        TILES=TILES,
        num_warps=MEASURE_WARPS,
    )
    _decide[(num_rows,)](
        logits,
        logits.stride(0),
        rows,
        pause,
        tau,
        min_prob,
        vocab,
        maxima,
        num_tiles,
        partials,
        num_chunks,
        *decision,
        top_k,
        torch.finfo(logits.dtype).max,
        TILE=TILE,
        ALL_TILES=triton.next_power_of_2(num_tiles),
        CHUNKS=triton.next_power_of_2(num_chunks),
        TOP_K=max(8, triton.next_power_of_2(top_k)),
        num_warps=DECIDE_WARPS,
    )
    return decision


@triton.jit(do_not_specialize=["num_tiles", "num_chunks"])
def _measure(
    logits,
    stride,
    rows,
    pause,
    vocab,
    maxima,
    num_tiles,
    partials,
    num_chunks,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Of one chunk of one row: the highest logit of each tile without PAUSE's; max m, sum(exp(x - m)) and
    sum((x - m) exp(x - m)) over all of it."""
    chunk, position = tl.program_id(0), tl.program_id(1)
    row = logits + tl.load(rows + position).to(tl.int64) * stride
    paused = -1 if pause is None else tl.load(pause + position)
    tiles = chunk * TILES + tl.arange(0, TILES)
    tokens = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
    x = tl.load(row + tokens, mask=tokens < vocab, other=float("-inf")).to(tl.float32)
    highest = tl.max(tl.where(tokens == paused, float("-inf"), x), 1)
    tl.store(maxima + position * num_tiles + tiles, highest, mask=tiles < num_tiles)

    top = tl.max(highest, 0)
    if pause is not None:
        # PAUSE's own logit counts whether it lies in this chunk or not: nothing above the row's highest.
        top = tl.maximum(top, tl.load(row + paused).to(tl.float32))
    z = x - tl.where(top == float("-inf"), 0.0, top)
    e = tl.exp(z)
    # exp(-1e4) is 0: the bound changes nothing but 0 * -inf, which would be NaN.
    weighted = tl.maximum(z, -1e4) * e
    to = partials + position * 3 * num_chunks + chunk
    tl.store(to, top)
    tl.store(to + num_chunks, tl.sum(tl.sum(e, 1), 0))
    tl.store(to + 2 * num_chunks, tl.sum(tl.sum(weighted, 1), 0))


@triton.jit(do_not_specialize=["num_tiles", "num_chunks", "top_k"])
def _decide(
    logits,
    stride,
    rows,
    pause,
    tau,
    min_prob,
    vocab,
    maxima,
    num_tiles,
    partials,
    num_chunks,
    entropies,
    log_sum_exps,
    opens,
    candidate_ids,
    candidate_probs,
    candidate_counts,
    top_k,
    largest,
    TILE: tl.constexpr,
    ALL_TILES: tl.constexpr,
    CHUNKS: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """Of one row: entropy and log-sum-exp from its chunks, the candidates if it is uncertain, PAUSE's logit."""
    position = tl.program_id(0)
    row = logits + tl.load(rows + position).to(tl.int64) * stride
    paused = -1 if pause is None else tl.load(pause + position)
    chunks = tl.arange(0, CHUNKS)
    there = chunks < num_chunks
    start = partials + position * 3 * num_chunks + chunks
    tops = tl.load(start, mask=there, other=float("-inf"))
    sums = tl.load(start + num_chunks, mask=there, other=0.0)
    weighted = tl.load(start + 2 * num_chunks, mask=there, other=0.0)
    top = tl.max(tops, 0)
    shift = tl.where(tops == float("-inf"), 0.0, tops - top)
    scale = tl.exp(shift)
    total = tl.sum(sums * scale, 0)
    log_total = tl.where(total > 0, tl.log(total), float("nan"))
    entropy = log_total - tl.sum((weighted + shift * sums) * scale, 0) / total
    log_sum_exp = top + log_total
    tl.store(entropies + position, entropy)
    tl.store(log_sum_exps + position, log_sum_exp)

    slots = tl.arange(0, TOP_K)
    ids, probs = tl.full([TOP_K], -1, tl.int32), tl.zeros([TOP_K], tl.float32)
    count = 0
    if entropy >= tl.load(tau + position):
        floor = tl.load(min_prob + position)
        tiles = tl.arange(0, ALL_TILES)
        highest = tl.load(maxima + position * num_tiles + tiles, mask=tiles < num_tiles, other=float("-inf"))
        value = tl.max(highest, 0)
        prob = tl.exp(value - log_sum_exp)
        # A floor of 0 lets in what is improbable, not what is impossible.
        likely = (prob >= floor) & (value > float("-inf"))
        before, before_id = float("inf"), -1
        while (count < top_k) & likely:
            tile = tl.min(tl.where(highest == value, tiles, ALL_TILES), 0)
            tokens = tile * TILE + tl.arange(0, TILE)
            x = tl.load(row + tokens, mask=tokens < vocab, other=float("-inf")).to(tl.float32)
            left = (tokens != paused) & ((x < before) | ((x == before) & (tokens > before_id)))
            token = tl.min(tl.where(left & (x == value), tokens, vocab), 0)
            highest = tl.where(tiles == tile, tl.max(tl.where(left & (tokens != token), x, float("-inf")), 0), highest)
            ids = tl.where(slots == count, token, ids)
            probs = tl.where(slots == count, prob, probs)
            count += 1
            before, before_id = value, token
            value = tl.max(highest, 0)
            prob = tl.exp(value - log_sum_exp)
            likely = (prob >= floor) & (value > float("-inf"))
    tl.store(candidate_ids + position * top_k + slots, ids, mask=slots < top_k)
    tl.store(candidate_probs + position * top_k + slots, probs, mask=slots < top_k)
    tl.store(candidate_counts + position, count)
    opened = count >= 2
    tl.store(opens + position, opened)
    if pause is not None:
        tl.store(row + paused, tl.where(opened, largest, float("-inf")))
