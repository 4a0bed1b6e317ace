"""Reports of open gates on their way to the actor: at once on a CPU, behind the model's back on a GPU."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from agd_vllm.engine.channel import EngineStep, GateSender, Report
from agd_vllm.engine.gate_params import GateParams
from agd_vllm.kernels.gate_decision import GateDecision

log = logging.getLogger("agd_vllm")

ToHost = Callable[[GateDecision], tuple[GateDecision, Callable[[], object]]]
"""Begins to copy a decision to the host; gives the copy and what waits until it is there."""


class ReportSender(Protocol):
    def send(
        self,
        decision: GateDecision | None,
        params: Sequence[GateParams],
        steps: Sequence[int],
        step: EngineStep | None,
    ) -> None:
        """Reports the rows of `decision` whose gate opened, and the engine's `step` if it is traced. Never raises."""


class DirectReports:
    """Where the decision lies in the host's memory."""

    def __init__(self, sender: GateSender):
        self._sender = sender

    def send(self, decision, params, steps, step) -> None:
        self._sender.send([] if decision is None else reports(decision, params, steps), step)


class FlushedReports:
    """Where the decision is still being computed: a thread of its own waits for it and sends it.

    It cannot be left to the next step: when all rows pause there is none.
    """

    def __init__(self, sender: GateSender, to_host: ToHost):
        self._direct = DirectReports(sender)
        self._to_host = to_host
        self._waiting: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._flush, name="agd-vllm-reports", daemon=True).start()

    def send(self, decision, params, steps, step) -> None:
        copy, wait = (None, None) if decision is None else self._to_host(decision)
        # With the decision itself: its memory must not be used for anything else before it is copied.
        self._waiting.put((decision, copy, wait, list(params), list(steps), step))

    def _flush(self) -> None:
        while True:
            _decision, copy, wait, params, steps, step = self._waiting.get()
            try:
                if wait is not None:
                    wait()
                self._direct.send(copy, params, steps, step)
            except Exception:
                # The row whose report is lost fails alone; the next ones need this thread.
                log.exception("a gate's report was lost")


class CopyFromGPU:
    """Copies on a stream of its own into pinned memory: the model's stream goes on, and the host does not wait."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def __call__(self, decision: GateDecision) -> tuple[GateDecision, Callable[[], object]]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copy = GateDecision(*(tensor.to("cpu", non_blocking=True) for tensor in decision))
            # blocking: the waiting thread sleeps instead of spinning.
            done = torch.cuda.Event(blocking=True)
            done.record()
        return copy, done.synchronize


def report_sender(sender: GateSender, device: torch.device) -> ReportSender:
    return FlushedReports(sender, CopyFromGPU(device)) if device.type == "cuda" else DirectReports(sender)


def reports(decision: GateDecision, params: Sequence[GateParams], steps: Sequence[int]) -> list[Report]:
    """One for each row whose gate opened: key, step, entropy, candidate ids and probabilities."""
    opened = decision.open.nonzero().squeeze(-1)
    columns = (column[opened].tolist() for column in (decision.entropy, *decision[3:]))
    result = []
    for position, entropy, ids, probs, count in zip(opened.tolist(), *columns, strict=True):
        count = min(count, params[position].top_k)
        result.append((params[position].key, steps[position], entropy, ids[:count], probs[:count]))
    return result
