"""Entropies of every step on vLLM's side, for calibration: a logits processor that changes nothing."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import msgspec
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from agd_vllm.engine.batch_rows import BatchRow, checked_params, new_row
from agd_vllm.engine.channel import SOCKET_VARIABLE, GateSender
from agd_vllm.kernels.gate import entropy_and_log_sum_exp

EXTRA_ARG = "agd_entropies"


class EntropyParams(msgspec.Struct, frozen=True):
    """What a request carries in `SamplingParams.extra_args["agd_entropies"]`; `key` names its row in reports,
    `prompt_len` is the length of the row's original prompt."""

    key: int
    prompt_len: int
    pause_id: ClassVar[None] = None  # these requests never pause

    def as_extra_args(self) -> dict[str, dict[str, Any]]:
        return {EXTRA_ARG: msgspec.to_builtins(self)}


class EntropyProcessor(LogitsProcessor):
    """Model Runner V1 interface. Reports by (key, step): an unfinished chunked prefill reports its row's step, too."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
        self._rows: dict[int, BatchRow] = {}
        self._device = device
        self._sender = GateSender(os.environ[SOCKET_VARIABLE]) if get_tensor_model_parallel_rank() == 0 else None

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        checked_params(sampling_params, EXTRA_ARG, EntropyParams)

    def is_argmax_invariant(self) -> bool:
        # It changes no logits, but vLLM leaves out invariant processors where all rows are greedy.
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, new_row(EXTRA_ARG, EntropyParams))

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """`logits` [batch, vocab], unchanged."""
        if self._rows and self._sender is not None:
            index = torch.tensor(list(self._rows), device=self._device)
            entropies, _ = entropy_and_log_sum_exp(logits[index])
            rows = zip(self._rows.values(), entropies.tolist(), strict=True)
            self._sender.send_entropies([(row.params.key, row.step(), entropy) for row, entropy in rows])
        return logits
