"""Inline attribution's choice as a logits processor of vLLM's Model Runner V2, which GPUs have."""

from __future__ import annotations

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor, LogitsProcRequestState

from agd_vllm.inline.params import InlineParams, inline_params
from agd_vllm.inline.runner_v2 import RunnerV2
from agd_vllm.inline.selection import Selection


class InlineProcessorV2(LogitsProcessor):
    """Must never raise in `apply`, which would kill the engine: parameters are checked in `validate_params`."""

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState):
        self._runner = RunnerV2.of(vllm_config)
        self._selection = Selection(req_states.device)
        self._prompt_lens, self._prefill_lens = req_states.prompt_len.np, req_states.prefill_len.np
        self._slots: dict[int, InlineParams] = {}
        self._batch: np.ndarray | None = None
        self._rows = np.empty(0, dtype=np.int64)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        inline_params(sampling_params)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        params = inline_params(sampling_params)
        self._slots.pop(req_idx, None)
        if params is not None:
            self._slots[req_idx] = params
        self._batch = None
        return params is not None

    def apply_staged_writes(self) -> None:
        """vLLM calls this before every forward pass."""
        self._selection.begin()

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """`logits` float32 [batch, vocabulary]: without speculative decoding their rows are the requests."""
        slots = ctx.idx_mapping_np
        if self._batch is None or not np.array_equal(self._batch, slots):
            self._batch = slots.copy()
            self._rows = np.array([row for row, slot in enumerate(slots) if slot in self._slots], dtype=np.int64)
            self._selection.set_rows(self._rows.tolist(), [self._slots[slot] for slot in slots[self._rows].tolist()])
        own = slots[self._rows]
        # Tokens that the one to be sampled sees: after a preemption the prompt is fed again with all that followed.
        seen = ctx.seq_lens_upper_bound_np[self._rows]
        steps = (seen - self._prompt_lens[own]).tolist()
        kept = (seen >= self._prefill_lens[own]).tolist()
        self._selection.apply(
            logits,
            [step if finished else None for step, finished in zip(steps, kept, strict=True)],
            self._runner.tangents,
            self._runner.unembedding,
        )
        return logits
