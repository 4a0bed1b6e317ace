"""Reports of what was decided on their way to the actor: at once on a CPU, behind the model's back on a GPU."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from agd_vllm.engine.channel import EngineStep, GateSender, Report
from agd_vllm.kernels.gate_decision import GateDecision

if TYPE_CHECKING:
    # It imports vLLM, which the tests of a GPU's kernels and copies do without.
    from agd_vllm.engine.gate_params import GateParams

log = logging.getLogger("agd_vllm")

Deliver = Callable[[Any, Sequence[Any], Sequence[Any], EngineStep | None], None]
"""Sends what came of the rows of a batch (tensors by name, in the host's memory; None: nothing), with the parameters
and the output step of each row, and the engine's step if it is traced. Never raises."""

ToHost = Callable[[Any], tuple[Any, Callable[[], object]]]
"""Begins to copy what came of the rows to the host; gives the copy and what waits until it is there."""


def gate_reports(sender: GateSender) -> Deliver:
    """Reports the rows of a GateDecision whose gate opened."""

    def deliver(decision, params, steps, step) -> None:
        sender.send([] if decision is None else reports(decision, params, steps), step)

    return deliver


class FlushedReports:
    """Where what came of the rows is still being computed: a thread of its own waits for it and delivers it.

    It cannot be left to the next step: when all rows pause there is none.
    """

    def __init__(self, deliver: Deliver, to_host: ToHost):
        self._deliver = deliver
        self._to_host = to_host
        self._waiting: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._flush, name="agd-vllm-reports", daemon=True).start()

    def send(self, result, params, steps, step) -> None:
        copy, wait = (None, None) if result is None else self._to_host(result)
        # With the result itself: its memory must not be used for anything else before it is copied.
        self._waiting.put((result, copy, wait, list(params), list(steps), step))

    def _flush(self) -> None:
        while True:
            _result, copy, wait, params, steps, step = self._waiting.get()
            try:
                if wait is not None:
                    wait()
                self._deliver(copy, params, steps, step)
            except Exception:
                # The row whose report is lost fails alone; the next ones need this thread.
                log.exception("a gate's report was lost")


class CopyFromGPU:
    """Copies on a stream of its own into pinned memory: the model's stream goes on, and the host does not wait."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def __call__(self, result: Any) -> tuple[Any, Callable[[], object]]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copy = type(result)(*(tensor.to("cpu", non_blocking=True) for tensor in result))
            # blocking: the waiting thread sleeps instead of spinning.
            done = torch.cuda.Event(blocking=True)
            done.record()
        return copy, done.synchronize


def report_sender(deliver: Deliver, device: torch.device) -> Deliver:
    """`deliver` for what lies on `device`."""
    return FlushedReports(deliver, CopyFromGPU(device)).send if device.type == "cuda" else deliver


def reports(decision: GateDecision, params: Sequence[GateParams], steps: Sequence[int]) -> list[Report]:
    """One for each row whose gate opened: key, step, entropy, candidate ids and probabilities."""
    opened = decision.open.nonzero().squeeze(-1)
    columns = (column[opened].tolist() for column in (decision.entropy, *decision[3:]))
    result = []
    for position, entropy, ids, probs, count in zip(opened.tolist(), *columns, strict=True):
        count = min(count, params[position].top_k)
        result.append((params[position].key, steps[position], entropy, ids[:count], probs[:count]))
    return result
