"""The gate behind both of vLLM's interfaces: Model Runner V1, and V2 on buffers that stand in for a GPU's."""

import asyncio
import os
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor.loader import build_custom_logits_processors_params_validator

from agd_vllm.engine import gate as gate_module
from agd_vllm.engine import gate_v1, gate_v2
from agd_vllm.engine.channel import TRACE_VARIABLE, GateReceiver, GateSender
from agd_vllm.engine.engine import GATE_PROCESSORS
from agd_vllm.engine.gate_params import GateParams
from agd_vllm.engine.gate_reports import FlushedReports, gate_reports
from agd_vllm.engine.orphans import ACTOR_VARIABLE
from agd_vllm.kernels.gate import gate_twin
from agd_vllm.kernels.gate_decision import GateDecision

VOCABULARY, PAUSE = 50, 49
CPU = torch.device("cpu")
CONFIG = SimpleNamespace(num_speculative_tokens=0, parallel_config=SimpleNamespace(enable_batch_sharded_sampling=False))
HIGHEST = torch.finfo(torch.float32).max


@pytest.fixture
def receiver(monkeypatch):
    """An actor's end, in whose environment the processors are made; there is no tensor parallelism to ask."""
    monkeypatch.delenv(TRACE_VARIABLE, raising=False)
    monkeypatch.setenv(ACTOR_VARIABLE, f"{os.getpid()}")
    for module in (gate_v1, gate_v2):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: 0)
    steps = []
    receiver = GateReceiver(steps.append)
    receiver.steps = steps
    expect_all(receiver)
    yield receiver
    receiver.close()


def expect_all(receiver) -> None:
    for key in range(10):
        receiver.expect(key)


def gated(key: int, prompt_len: int, **changes) -> SamplingParams:
    params = {"key": key, "prompt_len": prompt_len, "pause_id": PAUSE, "tau": 0.5, "top_k": 3, "min_prob": 0.05}
    return SamplingParams(temperature=0.0, extra_args=GateParams(**params | changes).as_extra_args())


PLAIN = SamplingParams(temperature=0.0)


def uncertain(*tokens: int) -> torch.Tensor:
    """Logits of a row that hesitates between these tokens (the first is the likeliest), or of one that is sure."""
    row = torch.zeros(VOCABULARY)
    for place, token in enumerate(tokens or (7,)):
        row[token] = 9.0 - 0.1 * place if tokens else 30.0
    return row


def make_v2() -> gate_v2.GateProcessorV2:
    states = LogitsProcRequestState(CPU, 8, VOCABULARY, *[None] * 4)
    return gate_v2.GateProcessorV2(CONFIG, states)


def step_v2(processor, slots: list[int], seq_lens: list[int], rows: list[torch.Tensor]) -> torch.Tensor:
    """One engine step: rows of the logits are the batch's requests, each in its slot."""
    processor.apply_staged_writes()
    mapping = torch.tensor(slots)
    nothing = torch.zeros_like(mapping)
    context = LogitsContext(
        mapping, mapping, np.array(slots), nothing, nothing, torch.tensor(seq_lens) - 1, np.array(seq_lens)
    )
    return processor.apply(torch.stack(rows), context)


def reports_of(receiver) -> dict:
    receiver.drain()
    return {key: (gate.step, gate.candidate_ids) for key, gate in receiver._latest.items() if gate}


def test_both_interfaces_decide_and_report_alike(receiver):
    """Three requests, one of them not gated; then one more token each, the batch in another order."""
    rows = [uncertain(3, 4), uncertain(3, 4), uncertain(5, 6, 8, 9)]
    again = [uncertain(), uncertain(10, 2)]

    v2 = make_v2()
    assert [v2.add_request(4, gated(1, 10)), v2.add_request(0, PLAIN), v2.add_request(7, gated(2, 10))] == [1, 0, 1]
    first_v2 = step_v2(v2, [4, 0, 7], [13, 20, 10], rows)
    seen_v2 = reports_of(receiver)
    second_v2 = step_v2(v2, [7, 4], [11, 14], again)
    then_v2 = reports_of(receiver)
    expect_all(receiver)

    v1 = gate_v1.GateProcessorV1(CONFIG, CPU, False)
    outputs = {1: [0] * 3, 2: []}
    added = [(0, gated(1, 10), [0] * 10, outputs[1]), (1, PLAIN, [0] * 20, []), (2, gated(2, 10), [0] * 10, outputs[2])]
    v1.update_state(BatchUpdate(3, [], added, []))
    first_v1 = v1.apply(torch.stack(rows))
    seen_v1 = reports_of(receiver)
    for ids in outputs.values():
        ids.append(0)
    v1.update_state(
        BatchUpdate(2, [2], [(0, gated(2, 10), [0] * 10, outputs[2]), (1, gated(1, 10), [0] * 10, outputs[1])], [])
    )
    second_v1 = v1.apply(torch.stack(again))

    assert seen_v2 == seen_v1 == {1: (3, (3, 4)), 2: (0, (5, 6, 8))}
    assert then_v2 == reports_of(receiver) == {1: (4, (10, 2)), 2: (0, (5, 6, 8))}
    assert torch.equal(first_v2, first_v1) and torch.equal(second_v2, second_v1)
    assert first_v2[:, PAUSE].tolist() == [HIGHEST, 0.0, HIGHEST]
    assert second_v2[:, PAUSE].tolist() == [-torch.inf, HIGHEST]


def test_a_resumed_session_and_the_next_one_in_its_slot(receiver):
    """After a pause vLLM removes the request and adds it again, its outputs as prompt; slots are used by others."""
    v2 = make_v2()
    v2.add_request(3, gated(1, 10))
    step_v2(v2, [3], [12], [uncertain(3, 4)])
    v2.add_request(5, gated(1, 10))
    v2.add_request(3, gated(9, 30, tau=torch.inf))
    assert step_v2(v2, [3, 5], [33, 13], [uncertain(3, 4), uncertain(6, 5)])[:, PAUSE].tolist() == [-torch.inf, HIGHEST]
    assert reports_of(receiver) == {1: (3, (6, 5))}
    assert not v2.add_request(3, PLAIN)
    assert step_v2(v2, [3, 5], [8, 14], [uncertain(3, 4), uncertain()])[:, PAUSE].tolist() == [0.0, -torch.inf]


def test_reports_leave_a_gpu_without_a_next_step(receiver, monkeypatch):
    """All rows pause: the model's thread has gone on, and the report goes out once the copy is there."""
    copied, waits = threading.Event(), []

    def slow_copy(decision: GateDecision):
        copy = GateDecision(*(torch.zeros_like(tensor) for tensor in decision))

        def wait():
            waits.append(threading.current_thread().name)
            assert copied.wait(20)
            for to, tensor in zip(copy, decision, strict=True):
                to.copy_(tensor)

        return copy, wait

    monkeypatch.setattr(gate_module, "report_sender", lambda deliver, device: FlushedReports(deliver, slow_copy).send)
    v2 = make_v2()
    v2.add_request(2, gated(1, 10))
    assert step_v2(v2, [2], [12], [uncertain(3, 4)])[0, PAUSE] == HIGHEST
    assert reports_of(receiver) == {}

    async def take():
        asyncio.get_running_loop().add_reader(receiver.fileno(), receiver.drain)
        taken = asyncio.create_task(receiver.take(1, 2))
        await asyncio.sleep(0.05)
        assert not taken.done()
        copied.set()
        return await asyncio.wait_for(taken, 20)

    gate = asyncio.run(take())
    assert (gate.step, gate.candidate_ids) == (2, (3, 4))
    assert waits == ["agd-vllm-reports"]


def test_a_report_that_fails_loses_no_other(receiver, caplog):
    def copy(decision):
        return decision, lambda: 1 / 0 if decision.entropy[0] == 0 else None

    flushed = FlushedReports(gate_reports(GateSender(receiver.path)), copy)
    params = [GateParams(1, 10, PAUSE, 0.5, 3, 0.05)]
    tau, min_prob = torch.tensor([0.5]), torch.tensor([0.05])
    decision = gate_twin(uncertain(3, 4)[None], torch.tensor([0]), tau, 3, min_prob, torch.tensor([PAUSE]))
    flushed.send(decision._replace(entropy=torch.zeros(1)), params, [1], None)
    flushed.send(decision, params, [2], None)
    deadline = time.monotonic() + 20
    while not reports_of(receiver) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert reports_of(receiver) == {1: (2, (3, 4))}
    assert "a gate's report was lost" in caplog.text


def test_steps_are_traced_with_and_without_gated_rows(receiver, monkeypatch):
    monkeypatch.setenv(TRACE_VARIABLE, "1")
    v2 = make_v2()
    step_v2(v2, [1], [5], [uncertain(3, 4)])
    v2.add_request(2, gated(1, 4))
    step_v2(v2, [1, 2], [6, 5], [uncertain(3, 4)] * 2)
    receiver.drain()
    assert [step.rows for step in receiver.steps] == [1, 2]
    assert all(0 <= step.gate_seconds <= step.seconds for step in receiver.steps)


def test_vllm_takes_the_v2_class_and_refuses_bad_parameters():
    """By the loader that vLLM's own front end uses."""
    validate = build_custom_logits_processors_params_validator([GATE_PROCESSORS[True]])
    validate(gated(1, 10))
    validate(PLAIN)
    for bad, words in (
        (gated(1, 10, top_k=1), "top_k >= 2"),
        (SamplingParams(temperature=0.5, extra_args=gated(1, 10).extra_args), "must be greedy"),
        (SamplingParams(temperature=0.0, extra_args={"agd": {"key": 1}}), r"extra_args\['agd'\]"),
    ):
        with pytest.raises(VLLMValidationError, match=words):
            validate(bad)


def test_v2_refuses_to_speculate(receiver):
    config = SimpleNamespace(num_speculative_tokens=2, parallel_config=CONFIG.parallel_config)
    with pytest.raises(ValueError, match="leave speculative decoding out"):
        gate_v2.GateProcessorV2(config, LogitsProcRequestState(CPU, 8, VOCABULARY, *[None] * 4))
