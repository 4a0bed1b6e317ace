"""vLLM's side of the gate: a batch logits processor that turns a gated step into the PAUSE token."""

from __future__ import annotations

import os
import time
from typing import Any

import msgspec
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from agd_vllm.engine.channel import SOCKET_VARIABLE, TRACE_VARIABLE, EngineStep, GateSender, Report
from agd_vllm.engine.orphans import end_with_actor
from agd_vllm.kernels.gate import GateDecision, gate

EXTRA_ARG = "agd"


class GateParams(msgspec.Struct, frozen=True):
    """What a request carries in `SamplingParams.extra_args["agd"]`; requests without it are left untouched.

    `key` names the row in reports; `prompt_len` is the length of its original prompt, so that
    step = tokens so far - prompt_len; `pause_id` is masked at open steps and forced at gated ones.
    """

    key: int
    prompt_len: int
    pause_id: int
    tau: float
    top_k: int
    min_prob: float

    def as_extra_args(self) -> dict[str, dict[str, Any]]:
        return {EXTRA_ARG: msgspec.to_builtins(self)}


class _GatedRow(msgspec.Struct):
    params: GateParams
    context_len: int  # prompt as vLLM sees it: after a resume it holds earlier outputs too
    output_ids: list[int]  # vLLM's own running list

    def step(self) -> int:
        return self.context_len + len(self.output_ids) - self.params.prompt_len


class GateProcessor(LogitsProcessor):
    """Model Runner V1 interface. Must never raise in `apply`: parameters are checked in `validate_params`."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
        self._rows: dict[int, _GatedRow] = {}
        self._device = device
        # Every tensor-parallel rank computes the same decision; one reports it.
        self._sender = GateSender(os.environ[SOCKET_VARIABLE]) if get_tensor_model_parallel_rank() == 0 else None
        self._traced = TRACE_VARIABLE in os.environ
        end_with_actor()
        self._begun = time.time()

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        params = (sampling_params.extra_args or {}).get(EXTRA_ARG)
        if params is None:
            return
        try:
            params = msgspec.convert(params, GateParams)
        except msgspec.ValidationError as error:
            raise ValueError(f"extra_args[{EXTRA_ARG!r}]: {error}") from error
        if sampling_params.temperature != 0:
            raise ValueError("a gated request must be greedy (temperature 0)")
        if not params.tau >= 0 or params.top_k < 2 or not 0 <= params.min_prob <= 1:
            raise ValueError("a gate needs tau >= 0, top_k >= 2 and 0 <= min_prob <= 1")

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """vLLM calls this before every forward pass."""
        self._begun = time.time()
        if process_dict_updates(self._rows, batch_update, _new_row):
            self._index_rows()

    def _index_rows(self) -> None:
        indices = sorted(self._rows)
        params = [self._rows[i].params for i in indices]

        def column(values: list, dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=self._device)

        self._indices = indices
        self._index = column(indices, torch.int64)
        self._pause = column([p.pause_id for p in params], torch.int64)
        self._tau = column([p.tau for p in params], torch.float32)
        self._min_prob = column([p.min_prob for p in params], torch.float32)
        self._top_k = max((p.top_k for p in params), default=0)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """`logits` [batch, vocab], changed in place: PAUSE becomes the argmax of gated rows, impossible elsewhere."""
        begun, reports = time.time(), []
        if self._rows:
            reports = self._gate(logits)
        if self._sender is not None:
            step = None
            if self._traced:
                now = time.time()
                step = EngineStep(self._begun, now - self._begun, now - begun, logits.shape[0])
            self._sender.send(reports, step)
        return logits

    def _gate(self, logits: torch.Tensor) -> list[Report]:
        everyone = len(self._indices) == logits.shape[0]
        rows = logits if everyone else logits[self._index]
        decision = gate(rows, self._tau, self._top_k, self._min_prob, self._pause)
        logits[self._index, self._pause] = float("-inf")
        logits[self._index[decision.gated], self._pause[decision.gated]] = torch.finfo(logits.dtype).max
        return self._reports(decision)

    def _reports(self, decision: GateDecision) -> list[Report]:
        reports = []
        columns = zip(
            decision.gated.tolist(),
            decision.entropy[decision.gated].tolist(),
            decision.candidate_ids.tolist(),
            decision.candidate_probs.tolist(),
            decision.candidate_count.tolist(),
            strict=True,
        )
        for position, entropy, ids, probs, count in columns:
            row = self._rows[self._indices[position]]
            count = min(count, row.params.top_k)
            reports.append((row.params.key, row.step(), entropy, ids[:count], probs[:count]))
        return reports


def _new_row(params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]) -> _GatedRow | None:
    extra = (params.extra_args or {}).get(EXTRA_ARG)
    if extra is None:
        return None
    return _GatedRow(msgspec.convert(extra, GateParams), len(prompt_ids or ()), output_ids)
