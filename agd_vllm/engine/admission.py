"""Admission by worst-case KV blocks: paused sessions are never preempted, so vLLM alone would deadlock.

The tangent cache of the attribution workers is the second budget: sequences visited in turn that do not all fit evict
each other every time, and each step would compute its whole prefix anew.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from contextlib import asynccontextmanager

from agd_vllm.records import PreparedRow, RowRefused


class Admission:
    """Lets a row in only while every session in flight could grow to its end, in the order of arrival.

    A row reserves ceil((prompt + max_tokens) / block_size) blocks and one of `max_sessions` slots; vLLM keeps one
    block for itself (the null block), so `num_blocks - 1` are to be had. A gated row reserves the whole blocks that
    prompt + max_tokens take of the workers' cache, too; one that is larger than that cache goes in alone. A row of two
    sequences reserves for both at once: two rows that each held room for one of theirs would wait for each other.
    """

    def __init__(self, num_blocks: int, block_size: int, max_sessions: int, max_model_len: int):
        self._free_blocks = self._all_blocks = num_blocks - 1
        self._free_slots = self._all_slots = max_sessions
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._free_tangents = self._all_tangents = sys.maxsize
        self._tangent_block = 1
        self._waiting: deque[tuple[int, int, int, asyncio.Future]] = deque()

    def limit_attribution(self, cache_tokens: int | None, block_tokens: int) -> None:
        """To be said before the first gated row. None: no limit. The workers' cache is handed out by whole blocks."""
        limit = sys.maxsize if cache_tokens is None else cache_tokens // block_tokens
        self._free_tangents = self._all_tangents = limit
        self._tangent_block = block_tokens

    def tokens(self, row: PreparedRow) -> int:
        return min(len(row.prompt_token_ids) + row.max_tokens, self._max_model_len)

    def blocks(self, row: PreparedRow) -> int:
        return -(-self.tokens(row) // self._block_size)

    def tangent_blocks(self, row: PreparedRow) -> int:
        return min(-(-self.tokens(row) // self._tangent_block), self._all_tangents)

    @asynccontextmanager
    async def reserve(self, row: PreparedRow, gated: bool, beside: PreparedRow | None = None):
        """Waits for room, holds it for the block's time. Raises RowRefused for a row larger than the whole cache.

        `beside`: the row's second sequence, if it has one.
        """
        sequences = [row] if beside is None else [row, beside]
        need, slots = sum(map(self.blocks, sequences)), len(sequences)
        if need > self._all_blocks:
            raise RowRefused(
                "too_long",
                f"prompt and max_tokens need {need} KV blocks of {self._block_size} tokens, the whole cache has "
                f"{self._all_blocks}; lower max_tokens or raise the cache (--engine-arg kv_cache_memory_bytes=...)",
            )
        if slots > self._all_slots:
            raise RowRefused(
                "too_few_sessions",
                f"the row is decoded as {slots} sequences side by side, the engine takes {self._all_slots}; "
                "raise it (--engine-arg max_num_seqs=...)",
            )
        tangents = self.tangent_blocks(row) if gated else 0
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((need, tangents, slots, turn))
        self._admit()
        try:
            await turn
            yield
        finally:
            # A turn given in the very moment its row was cancelled is handed back all the same.
            if not turn.cancelled():
                self._free_blocks += need
                self._free_tangents += tangents
                self._free_slots += slots
            self._admit()

    def _admit(self) -> None:
        # First come, first served: a large row at the head waits for room, and nothing small overtakes it for ever.
        while self._waiting:
            need, tangents, slots, turn = self._waiting[0]
            fits = need <= self._free_blocks and tangents <= self._free_tangents and slots <= self._free_slots
            if not turn.cancelled() and not fits:
                break
            self._waiting.popleft()
            if turn.cancelled():
                continue
            self._free_blocks -= need
            self._free_tangents -= tangents
            self._free_slots -= slots
            turn.set_result(None)
