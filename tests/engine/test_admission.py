"""Admission: worst-case blocks and slots are reserved, in the order of arrival, and handed back whatever happens."""

import asyncio

import pytest
import torch

from agd_vllm.attribution.block_pool import BLOCK_TOKENS, CacheShape
from agd_vllm.attribution.tangent_cache import CachedSequence, TangentCache
from agd_vllm.engine.admission import Admission
from agd_vllm.records import PreparedRow, Roi, RowRefused


def row(tokens: int) -> PreparedRow:
    """A row that needs room for `tokens` tokens, all but one of them prompt."""
    return PreparedRow("r", [0] * (tokens - 1), Roi(), 1)


async def holds(admission: Admission, tokens: int, log: list, name: str, release: asyncio.Event) -> None:
    async with admission.reserve(row(tokens), gated=True):
        log.append(name)
        await release.wait()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_blocks_are_rounded_up_and_capped_at_the_models_length():
    admission = Admission(num_blocks=11, block_size=16, max_sessions=4, max_model_len=100)
    assert [admission.blocks(row(tokens)) for tokens in (1, 16, 17, 100, 500)] == [1, 1, 2, 7, 7]


def test_rows_wait_for_blocks_in_the_order_of_arrival():
    async def scenario():
        admission = Admission(num_blocks=11, block_size=16, max_sessions=9, max_model_len=10**6)
        log, release = [], [asyncio.Event() for _ in range(4)]
        sizes = (96, 96, 16, 64)  # 6, 6, 1 and 4 of 10 blocks
        tasks = [
            asyncio.create_task(holds(admission, size, log, name, event))
            for size, name, event in zip(sizes, "abcd", release, strict=True)
        ]
        await settle()
        assert log == ["a"]  # b does not fit, and c does not overtake it
        release[0].set()
        await settle()
        assert log == ["a", "b", "c"]
        release[2].set()
        await settle()
        assert log == ["a", "b", "c", "d"]
        for event in release:
            event.set()
        await asyncio.gather(*tasks)

    run(scenario)


def test_no_more_sessions_than_slots():
    async def scenario():
        admission = Admission(num_blocks=1000, block_size=16, max_sessions=2, max_model_len=10**6)
        log, release = [], asyncio.Event()
        tasks = [asyncio.create_task(holds(admission, 16, log, str(i), release)) for i in range(5)]
        await settle()
        assert len(log) == 2
        release.set()
        await asyncio.gather(*tasks)
        assert len(log) == 5

    run(scenario)


@pytest.mark.parametrize("waiting", [True, False])
def test_a_cancelled_row_gives_everything_back(waiting):
    async def scenario():
        admission = Admission(num_blocks=11, block_size=16, max_sessions=1, max_model_len=10**6)
        log, release = [], asyncio.Event()
        first = asyncio.create_task(holds(admission, 160, log, "first", release))
        second = asyncio.create_task(holds(admission, 160, log, "second", release))
        await settle()
        (second if waiting else first).cancel()
        await settle()
        release.set()
        await asyncio.gather(first, second, return_exceptions=True)
        log.clear()
        await holds(admission, 160, log, "third", release)
        assert log == ["third"]

    run(scenario)


def test_a_row_larger_than_the_whole_cache_is_refused():
    async def scenario():
        admission = Admission(num_blocks=11, block_size=16, max_sessions=4, max_model_len=10**6)
        with pytest.raises(RowRefused, match="11 KV blocks") as refused:
            async with admission.reserve(row(161), gated=True):
                pass
        assert refused.value.type == "too_long"
        async with admission.reserve(row(160), gated=True):
            pass

    run(scenario)


def test_gated_rows_wait_for_room_in_the_attribution_cache():
    async def scenario():
        admission = Admission(num_blocks=1000, block_size=16, max_sessions=9, max_model_len=10**6)
        admission.limit_attribution(100, 1)
        log, release = [], asyncio.Event()
        tasks = [asyncio.create_task(holds(admission, size, log, f"{size}", release)) for size in (60, 50, 40)]
        await settle()
        assert log == ["60"]
        release.set()
        await asyncio.gather(*tasks)
        release.clear()
        huge = asyncio.create_task(holds(admission, 500, log, "huge", release))
        small = asyncio.create_task(holds(admission, 10, log, "small", release))
        await settle()
        assert log[-1] == "huge"  # alone, with the whole budget
        small.cancel()
        async with admission.reserve(row(500), gated=False):  # an ungated row needs none of it
            pass
        release.set()
        await asyncio.gather(huge, small, return_exceptions=True)

    run(scenario)


def test_rows_let_in_side_by_side_never_evict_each_other():
    """Rows of one token more than a block: by tokens more of them would fit than the cache has blocks for."""
    shape = CacheShape(1, 1, 4, key_tangents=True, dtype=torch.float32, device=torch.device("cpu"))
    cache = TangentCache(shape, 7 * shape.block_bytes)
    tokens = BLOCK_TOKENS + 1

    async def decode(admission, name, release, log):
        async with admission.reserve(row(tokens), gated=True):
            sequence = CachedSequence(Roi())
            cache.add(name, sequence)
            for length in range(1, tokens + 1):
                cache.grow(sequence, length, [sequence])
                await asyncio.sleep(0)
            log.append(name)
            await release.wait()
            assert cache.get(name) is sequence
            cache.release(name)

    async def scenario():
        admission = Admission(num_blocks=1000, block_size=16, max_sessions=9, max_model_len=10**6)
        admission.limit_attribution(cache.pool.num_blocks * BLOCK_TOKENS, BLOCK_TOKENS)
        log, release = [], asyncio.Event()
        tasks = [asyncio.create_task(decode(admission, name, release, log)) for name in "abcde"]
        while len(log) < 3:
            await asyncio.sleep(0)
        for _ in range(2 * tokens):
            await asyncio.sleep(0)
        assert log == ["a", "b", "c"]
        release.set()
        await asyncio.gather(*tasks)

    run(scenario)


def test_a_row_of_two_sequences_waits_for_room_for_both():
    """Two rows that each held room for one of theirs would wait for each other for ever."""

    async def scenario():
        admission = Admission(num_blocks=13, block_size=16, max_sessions=3, max_model_len=10**6)
        log, release = [], [asyncio.Event() for _ in range(3)]

        async def pair(name, tokens, event):
            async with admission.reserve(row(tokens), False, beside=row(tokens - 16)):
                log.append(name)
                await event.wait()

        tasks = [asyncio.create_task(pair(name, 64, event)) for name, event in zip("ab", release, strict=False)]
        tasks.append(asyncio.create_task(holds(admission, 16, log, "single", release[2])))
        await settle()
        assert log == ["a"]  # 7 of 12 blocks and 2 of 3 slots; "b" needs as many, and nothing overtakes it
        release[0].set()
        await settle()
        assert log == ["a", "b", "single"]
        for event in release:
            event.set()
        await asyncio.gather(*tasks)
        log.clear()
        release[0].clear()
        tasks = [asyncio.create_task(pair(name, 112, release[0])) for name in "cd"]  # 7 + 6 blocks
        await settle()
        assert not log
        for task in tasks:
            assert isinstance(task.exception(), RowRefused)

    run(scenario)


def test_a_row_of_two_sequences_in_an_engine_of_one_is_refused():
    async def scenario():
        admission = Admission(num_blocks=11, block_size=16, max_sessions=1, max_model_len=100)
        with pytest.raises(RowRefused, match="max_num_seqs") as refused:
            async with admission.reserve(row(16), False, beside=row(16)):
                pass
        assert refused.value.type == "too_few_sessions"
        async with admission.reserve(row(16), gated=False):
            pass

    run(scenario)
