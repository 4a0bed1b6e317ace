"""Inline attribution's choice as a logits processor of vLLM's Model Runner V1, which CPUs have."""

from __future__ import annotations

import logging

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from agd_vllm.inline.arguments import rule_name
from agd_vllm.inline.params import inline_params
from agd_vllm.inline.runner_v1 import InlineRow, RunnerV1
from agd_vllm.inline.selection import Selection

log = logging.getLogger("agd_vllm")


class InlineProcessorV1(LogitsProcessor):
    """Must never raise in `apply`, which would kill the engine: parameters are checked in `validate_params`."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
        self._runner = RunnerV1.of(vllm_config)
        self._rule = rule_name(vllm_config)
        self._selection = Selection()

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        inline_params(sampling_params)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """vLLM calls this before every forward pass."""
        self._selection.begin()
        process_dict_updates(self._runner.rows, batch_update, self._new_row)

    def _new_row(self, params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]) -> InlineRow | None:
        found = inline_params(params)
        if found is not None and found.rule != self._rule:
            log.error("a request of rule %s in an engine of rule %s is decoded greedily", found.rule, self._rule)
            return None
        return None if found is None else InlineRow.of(found, len(prompt_ids or ()), output_ids)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """`logits` float32 [batch, vocabulary]."""
        runner = self._runner
        indices = runner.sampled_rows()
        rows = [runner.rows[index] for index in indices]
        self._selection.apply(
            logits,
            indices,
            [row.params for row in rows],
            [row.step for row in rows],
            runner.tangents,
            runner.unembedding,
        )
        return logits
