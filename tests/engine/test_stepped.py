"""vLLM stepped by a thread: what it refuses is the row's own fault, and the engine decodes on."""

import asyncio
from types import SimpleNamespace

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from agd_vllm.engine import stepped
from agd_vllm.engine.stepped import SteppedLLM


class Engine:
    """Refuses "bad" and ends every other request at its first step."""

    def __init__(self):
        self.waiting = []
        self.engine_core = SimpleNamespace(shutdown=lambda: None)

    def add_request(self, request_id, prompt, params):
        if request_id == "bad":
            raise VLLMValidationError("a head that is not there", parameter="heads")
        self.waiting.append(request_id)

    def abort_request(self, request_ids):
        pass

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def step(self):
        ended, self.waiting = self.waiting, []
        return [SimpleNamespace(request_id=request_id, finished=True) for request_id in ended]


def test_a_request_that_vllm_refuses_ends_alone(monkeypatch):
    monkeypatch.setattr(stepped, "_engine", lambda config: Engine())

    async def scenario():
        llm = SteppedLLM(None, None)
        with pytest.raises(VLLMValidationError, match="a head that is not there"):
            async for _ in llm.generate(None, SamplingParams(), "bad"):
                pass
        outputs = [output async for output in llm.generate(None, SamplingParams(), "good")]
        assert [output.request_id for output in outputs] == ["good"]
        assert not llm.errored
        llm.shutdown()

    asyncio.run(asyncio.wait_for(scenario(), 20))
