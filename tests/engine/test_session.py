"""A session against an engine that is made up, for what vLLM does at moments of its own choosing."""

import asyncio
from types import SimpleNamespace

import pytest
from vllm.v1.engine import EngineCoreRequest

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
        self.input_processor = self
        self.chunks, self.params = [], []
        self.aborted = []
        self._sender = GateSender(receiver.path)
        self._too_early = []

    async def get_supported_tasks(self):
        return ("generate",)

    def process_inputs(self, request_id, prompt, params, supported_tasks, resumable):
        tokens = prompt["prompt_token_ids"]
        return EngineCoreRequest(request_id, tokens, None, params, None, 0.0, None, None, None, resumable=resumable)

    def assign_request_id(self, request):
        request.request_id += "-internal"

    def _run_output_handler(self):
        pass

    async def _add_request(self, request, prompt, parent, index, collector):
        step, params = len(self.chunks), request.sampling_params
        self.params.append(params)
        self.chunks.append((request.prompt_token_ids, params.max_tokens, params.min_tokens))
        key = params.extra_args[EXTRA_ARG]["key"]
        self._sender.send(self._too_early)
        self._too_early = [(key, step + 1, 9.0, [1, 2], [0.5, 0.5])]
        report = (key, step, 1.0, [10 + step, 20 + step], [0.5, 0.5])
        asyncio.get_running_loop().call_later(0.05, self._sender.send, [report])
        completion = SimpleNamespace(token_ids=[PAUSE], finish_reason=None)
        collector.put(SimpleNamespace(num_cached_tokens=0, outputs=[completion]))

    async def abort(self, request_id, internal):
        self.aborted.append((request_id, internal))


def test_a_step_that_was_begun_before_the_pause_was_heard_of_is_no_answer(receiver):
    row = PreparedRow("a", [5, 6], Roi(), 10, min_tokens=2)
    params = GateParams(0, 2, PAUSE, 0.5, 5, 0.05)

    llm = AlwaysPausing(receiver)

    async def decode():
        asyncio.get_running_loop().add_reader(receiver.fileno(), receiver.drain)
        stops, keys = StopCheck(row, frozenset(), None), iter(range(1, 9))
        session = Session(llm, receiver, row, stops, params, keys, 20.0, lambda: None)
        gates = []
        for _ in range(3):
            gates.append(await session.next())
            session.select(30)
        await session.close()
        return [(gate.step, gate.candidate_ids) for gate in gates]

    assert asyncio.run(decode()) == [(0, (10, 20)), (1, (11, 21)), (2, (12, 22))]
    assert not receiver._latest
    # What each chunk brings, and what is left of max_tokens and min_tokens: those on their way are not changed.
    assert llm.chunks == [([5, 6], 10, 2), ([30], 9, 1), ([30], 8, 0)]
    assert [params.max_tokens for params in llm.params] == [10, 9, 8]
    assert llm.aborted == [("1-internal", True)]
