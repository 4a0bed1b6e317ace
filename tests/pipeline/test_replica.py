"""What an engine actor hands over, in what order, when its end has come; no vLLM is started."""

import asyncio
from types import SimpleNamespace

import pytest

from agd_vllm.attribution.batch_bounds import BatchBounds
from agd_vllm.attribution.pool import WorkerLost
from agd_vllm.engine import engine as engine_module
from agd_vllm.engine.settings import EngineSettings
from agd_vllm.models.inspect import inspect_model
from agd_vllm.pipeline import replica as replica_module
from agd_vllm.pipeline.replica import EngineLost, Replica, RowFailed
from agd_vllm.records import PreparedRow, Roi
from agd_vllm.strategies.agd import Agd


@pytest.fixture
def replica(smollm2):
    class Vllm:
        errored = False

    info, _ = inspect_model(str(smollm2), pauses=True)
    replica = Replica(info, EngineSettings(), Agd(), traced=False, debug=False)
    replica._engine._llm = Vllm()
    replica._engine._receiver = SimpleNamespace(drain=lambda: None, failure="ValueError: its own reason")
    replica._tokenizer = None
    return replica


def test_what_has_ended_is_handed_over_before_the_end_is_told_of(replica):
    async def scenario():
        replica._ended.put_nowait(RowFailed("a", "decode", "no"))
        replica._fatal = WorkerLost("gone")
        ended, _ = await replica.collect(0.01)
        assert [row.id for row in ended] == ["a"]
        replica._faults.record("worker_restarts")
        ended, progress = await replica.collect(0.01)
        assert (len(ended), len(progress.faults)) == (0, 1)
        with pytest.raises(WorkerLost):
            await replica.collect(0.01)

    asyncio.run(scenario())


def test_an_engine_that_died_or_is_silent_with_work_is_lost(replica, monkeypatch):
    async def scenario():
        await replica.collect(0.01)
        replica._engine._llm.errored = True
        with pytest.raises(EngineLost, match="died: ValueError: its own reason"):
            await replica.collect(0.01)
        replica._engine._llm.errored = False
        with replica._engine.occupancy.session():
            await replica.collect(0.01)
            monkeypatch.setattr(engine_module, "SILENCE_S", 0.05)
            with pytest.raises(EngineLost, match="no token"):
                await replica.collect(0.1)

    asyncio.run(scenario())


@pytest.fixture
def decoded_with(monkeypatch):
    """Rows to the pools that they were decoded with."""
    pools = {}

    async def decode_row(engine, pool, row, *rest):
        pools[row.id] = pool
        return RowFailed(row.id, "decode", "not in this test")

    monkeypatch.setattr(replica_module, "decode_row", decode_row)
    return pools


def row(name):
    return PreparedRow(name, [1, 2], Roi(), 4)


def test_rows_that_overtake_the_naming_of_the_workers_wait_for_it(replica, decoded_with):
    """Ray may begin a later call first: these rows must not be decoded greedily."""

    async def scenario():
        await replica.submit([row("a")], 1)
        ended, _ = await replica.collect(0.05)
        assert not ended and not decoded_with
        replica._engine.limit_attribution = lambda tokens, block_tokens: None
        await replica.attach([object()], True, 1000, BatchBounds())
        ended, _ = await replica.collect(1)
        assert [row.id for row in ended] == ["a"]
        assert decoded_with["a"] is replica._pool is not None

    asyncio.run(scenario())


def test_without_workers_rows_are_decoded_greedily(replica, decoded_with):
    async def scenario():
        await replica.attach([], False, None, BatchBounds())
        await replica.submit([row("a")], 1)
        await replica.collect(1)
        assert decoded_with == {"a": None}

    asyncio.run(scenario())


def test_rows_that_come_after_the_end_of_their_batch_are_not_decoded(replica, decoded_with):
    async def scenario():
        await replica.attach([], False, None, BatchBounds())
        await replica.cancel(1)
        await replica.submit([row("late")], 1)
        await replica.submit([row("next")], 2)
        ended, _ = await replica.collect(1)
        assert [row.id for row in ended] == ["next"]

    asyncio.run(scenario())


def test_an_engine_that_cannot_be_told_its_workers_says_so(replica, decoded_with):
    """There is no engine to take the workers' budget, as nothing was started."""

    async def scenario():
        await replica.attach([object()], True, 1000, BatchBounds())
        await replica.submit([row("a")], 1)
        with pytest.raises(WorkerLost, match="could not be told"):
            await replica.collect(0.05)
        assert not decoded_with

    asyncio.run(scenario())


def test_rows_do_not_wait_for_their_workers_for_ever(replica, decoded_with, monkeypatch):
    monkeypatch.setattr(replica_module, "POOL_DEADLINE_S", 0.05)

    async def scenario():
        await replica.submit([row("a")], 1)
        await asyncio.sleep(0.1)
        with pytest.raises(WorkerLost, match="was not told"):
            await replica.collect(0.05)
        assert not decoded_with

    asyncio.run(scenario())


def test_an_inline_engine_begins_with_a_prompt_that_is_a_region(replica, monkeypatch):
    """So that what is compiled for prompts and regions is compiled before rows wait."""
    rows = []

    async def decode_row(engine, pool, row, tokenizer, eos_ids, faults, strategy, *seed):
        rows.append(row)

    monkeypatch.setattr(replica_module, "decode_row", decode_row)
    replica._strategy = Agd(scorer="inline")
    for replica._engine.max_model_len, tokens in ((1024, 40), (16, 14)):
        asyncio.run(replica._take_first_steps())
        row = rows.pop()
        assert (len(row.prompt_token_ids), row.max_tokens) == (tokens, 2)
        assert [(span.start, span.end) for span in row.roi.spans] == [(0, tokens)]
