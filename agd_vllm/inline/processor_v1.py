"""Inline attribution's choice as a logits processor of vLLM's Model Runner V1, which CPUs have."""

from __future__ import annotations

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from agd_vllm.engine.penalty import penalize
from agd_vllm.inline.params import inline_params
from agd_vllm.inline.runner_v1 import InlineRow, RunnerV1
from agd_vllm.inline.selection import Selection


class InlineProcessorV1(LogitsProcessor):
    """Must never raise in `apply`, which would kill the engine: parameters are checked in `validate_params`."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
        self._runner = RunnerV1.of(vllm_config)
        self._selection = Selection(device)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        inline_params(sampling_params)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """vLLM calls this before every forward pass."""
        self._selection.begin()
        rows = self._runner.rows
        if process_dict_updates(rows, batch_update, self._new_row):
            indices = sorted(rows)
            self._selection.set_rows(indices, [rows[index].params for index in indices])

    def _new_row(self, params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]) -> InlineRow | None:
        found = inline_params(params)
        return None if found is None else InlineRow.of(found, prompt_ids or [], output_ids)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """`logits` float32 [batch, vocabulary]."""
        runner = self._runner
        penalized = [index for index, row in runner.rows.items() if row.params.repetition_penalty != 1]
        if penalized:
            rows = [runner.rows[index] for index in penalized]
            tokens = [torch.tensor(row.token_ids, device=logits.device) for row in rows]
            logits[penalized] = penalize(logits[penalized], tokens, [row.params.repetition_penalty for row in rows])
        self._selection.apply(logits, runner.sampled_steps(), runner.tangents, runner.unembedding)
        return logits
