"""The gate as a logits processor of vLLM's Model Runner V1, which CPUs have."""

from __future__ import annotations

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from agd_vllm.engine.batch_rows import BatchRow, new_row
from agd_vllm.engine.gate import BatchGate
from agd_vllm.engine.gate_params import EXTRA_ARG, GateParams, gate_params


class GateProcessorV1(LogitsProcessor):
    """Must never raise in `apply`, which would kill the engine: parameters are checked in `validate_params`."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
        self._rows: dict[int, BatchRow] = {}
        self._gated: list[BatchRow] = []
        self._gate = BatchGate(device, reports=get_tensor_model_parallel_rank() == 0)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        gate_params(sampling_params)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """vLLM calls this before every forward pass."""
        self._gate.begin()
        if process_dict_updates(self._rows, batch_update, new_row(EXTRA_ARG, GateParams)):
            indices = sorted(self._rows)
            self._gated = [self._rows[index] for index in indices]
            self._gate.set_rows(indices, [row.params for row in self._gated])

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        self._gate.apply(logits, [row.step() for row in self._gated])
        return logits
