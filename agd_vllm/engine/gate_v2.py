"""The gate as a logits processor of vLLM's Model Runner V2, which GPUs have."""

from __future__ import annotations

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor, LogitsProcRequestState

from agd_vllm.engine.gate import BatchGate
from agd_vllm.engine.gate_params import GateParams, gate_params


class GateProcessorV2(LogitsProcessor):
    """Keeps the parameters of each request slot; rows are looked up anew only when a batch has others than the last.

    A session that goes on after a pause enters a slot again, with a longer prompt. Must never raise in `apply`, which
    would kill the engine: parameters are checked in `validate_params`.
    """

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState):
        if vllm_config.num_speculative_tokens:
            raise ValueError("the gate judges one token at a time: leave speculative decoding out")
        self._slots: dict[int, GateParams] = {}
        self._batch: np.ndarray | None = None
        self._rows = self._prompt_lens = np.empty(0, dtype=np.int64)
        # Where the ranks share the rows of a batch out, each reports its own.
        shared_out = vllm_config.parallel_config.enable_batch_sharded_sampling
        self._gate = BatchGate(req_states.device, reports=shared_out or get_tensor_model_parallel_rank() == 0)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        gate_params(sampling_params)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        params = gate_params(sampling_params)
        self._slots.pop(req_idx, None)
        if params is not None:
            self._slots[req_idx] = params
        self._batch = None
        return params is not None

    def apply_staged_writes(self) -> None:
        """vLLM calls this before every forward pass."""
        self._gate.begin()

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Without speculative decoding the rows of the logits are the requests of the batch."""
        if self._batch is None or not np.array_equal(self._batch, ctx.idx_mapping_np):
            self._index(ctx.idx_mapping_np)
        # The tokens that the one to be sampled sees, at its own step: prompt, outputs and all that was fed since.
        steps = ctx.seq_lens_upper_bound_np[self._rows] - self._prompt_lens
        self._gate.apply(logits, steps.tolist())
        return logits

    def _index(self, slots: np.ndarray) -> None:
        self._batch = slots.copy()
        gated = [(row, self._slots[slot]) for row, slot in enumerate(slots.tolist()) if slot in self._slots]
        params = [params for _, params in gated]
        self._rows = np.array([row for row, _ in gated], dtype=np.int64)
        self._prompt_lens = np.array([p.prompt_len for p in params], dtype=np.int64)
        self._gate.set_rows(self._rows.tolist(), params)
