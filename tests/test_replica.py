"""What an engine actor hands over, in what order, when its end has come; no vLLM is started."""

import asyncio

import pytest

from agd_vllm.attribution.pool import WorkerLost
from agd_vllm.engine import engine as engine_module
from agd_vllm.engine.engine import EngineSettings, GateSettings
from agd_vllm.model import inspect_model
from agd_vllm.pipeline.replica import EngineLost, Replica, RowFailed


@pytest.fixture
def replica(smollm2):
    class Vllm:
        errored = False

    info, _ = inspect_model(str(smollm2), guided=True)
    replica = Replica(info, EngineSettings(), GateSettings(), traced=False, debug=False)
    replica._engine._llm = Vllm()
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
        with pytest.raises(EngineLost):
            await replica.collect(0.01)
        replica._engine._llm.errored = False
        with replica._engine.occupancy.session():
            await replica.collect(0.01)
            monkeypatch.setattr(engine_module, "SILENCE_S", 0.05)
            with pytest.raises(EngineLost):
                await replica.collect(0.1)

    asyncio.run(scenario())
