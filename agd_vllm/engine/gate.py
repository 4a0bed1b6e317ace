"""The gate in vLLM's worker process, by whichever interface it is called (`gate_v1`, `gate_v2`): a gated step becomes
the PAUSE token, and what the gate saw is reported to the actor."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import torch

from agd_vllm.engine.channel import SOCKET_VARIABLE, TRACE_VARIABLE, EngineStep, GateSender
from agd_vllm.engine.gate_params import GateParams
from agd_vllm.engine.gate_reports import gate_reports, report_sender
from agd_vllm.engine.last_words import report_failures
from agd_vllm.engine.orphans import end_with_actor
from agd_vllm.kernels.gate import gate
from agd_vllm.kernels.to_device import to_device


class BatchGate:
    """The gate over the rows of a batch: `begin` before each forward pass, `set_rows` whenever other rows are gated or
    they lie elsewhere, `apply` on the logits. With tensor parallelism every rank decides the same; one `reports`."""

    def __init__(self, device: torch.device, reports: bool):
        self._device = device
        sender = GateSender(os.environ[SOCKET_VARIABLE])
        self._reports = report_sender(gate_reports(sender), device) if reports else None
        self._traced = TRACE_VARIABLE in os.environ
        self.set_rows([], [])
        end_with_actor()
        report_failures()
        self.begin()

    def begin(self) -> None:
        self._begun = time.time()

    def set_rows(self, rows: Sequence[int], params: Sequence[GateParams]) -> None:
        """`rows` of the logits are gated, in ascending order, each by its `params`."""
        self._params = list(params)
        self._rows = self._column(rows, torch.int64)
        self._pause = self._column([p.pause_id for p in params], torch.int64)
        self._tau = self._column([p.tau for p in params], torch.float32)
        self._min_prob = self._column([p.min_prob for p in params], torch.float32)
        self._top_k = max((p.top_k for p in params), default=0)

    def _column(self, values: Sequence, dtype: torch.dtype) -> torch.Tensor:
        return to_device(torch.tensor(values, dtype=dtype), self._device)

    def apply(self, logits: torch.Tensor, steps: Sequence[int]) -> None:
        """`logits` [batch, vocab], changed in place: PAUSE becomes the argmax of rows whose gate opens, impossible in
        the other gated rows. `steps`: the output step of each gated row."""
        begun = time.time()
        decision = gate(logits, self._rows, self._tau, self._top_k, self._min_prob, self._pause) if steps else None
        if self._reports is None:
            return
        step = None
        if self._traced:
            now = time.time()
            step = EngineStep(self._begun, now - self._begun, now - begun, logits.shape[0])
        if decision is not None or step is not None:
            self._reports(decision, self._params, steps, step)
