"""A session against an engine that is made up, for what vLLM does at moments of its own choosing."""

import asyncio
from types import SimpleNamespace

import pytest

from agd_vllm.engine.channel import GateReceiver, GateSender
from agd_vllm.engine.gate_params import EXTRA_ARG, GateParams
from agd_vllm.engine.session import Session
from agd_vllm.engine.stops import StopCheck
from agd_vllm.records import PreparedRow, Roi

PAUSE = 49


@pytest.fixture
def receiver():
    receiver = GateReceiver(lambda step: None)
    yield receiver
    receiver.close()


class AlwaysPausing:
    """Each chunk is answered by PAUSE. Its report comes late, after that of a step that vLLM had begun too early."""

    def __init__(self, receiver):
        self._sender = GateSender(receiver.path)
        self._too_early = []

    async def generate(self, inputs, params, request_id):
        loop = asyncio.get_running_loop()
        step = 0
        async for chunk in inputs:
            key = chunk.sampling_params.extra_args[EXTRA_ARG]["key"]
            self._sender.send(self._too_early)
            self._too_early = [(key, step + 1, 9.0, [1, 2], [0.5, 0.5])]
            report = (key, step, 1.0, [10 + step, 20 + step], [0.5, 0.5])
            loop.call_later(0.05, self._sender.send, [report])
            step += 1
            yield SimpleNamespace(num_cached_tokens=0, outputs=[SimpleNamespace(token_ids=[PAUSE], finish_reason=None)])


def test_a_step_that_was_begun_before_the_pause_was_heard_of_is_no_answer(receiver):
    row = PreparedRow("a", [5, 6], Roi(), 10)
    params = GateParams(0, 2, PAUSE, 0.5, 5, 0.05)

    async def decode():
        asyncio.get_running_loop().add_reader(receiver.fileno(), receiver.drain)
        stops, keys = StopCheck(row, frozenset(), None), iter(range(1, 9))
        session = Session(AlwaysPausing(receiver), receiver, row, stops, params, keys, 20.0, lambda: None)
        gates = []
        for _ in range(3):
            gates.append(await session.next())
            session.select(30)
        await session.close()
        return [(gate.step, gate.candidate_ids) for gate in gates]

    assert asyncio.run(decode()) == [(0, (10, 20)), (1, (11, 21)), (2, (12, 22))]
    assert not receiver._latest
