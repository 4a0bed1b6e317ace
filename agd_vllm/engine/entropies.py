"""Entropies of every step on vLLM's side, for calibration: a logits processor that changes nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec
import torch

from agd_vllm.engine.channel import SOCKET_VARIABLE, GateSender
from agd_vllm.engine.row_processor import Row, RowProcessor
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


class Entropies:
    """Reports by (key, step): an unfinished chunked prefill reports its row's step, too."""

    extra_arg, kind = EXTRA_ARG, EntropyParams

    def __init__(self, device: torch.device, reports: bool):
        self._device = device
        self._sender = GateSender(os.environ[SOCKET_VARIABLE]) if reports else None

    @staticmethod
    def check(params: EntropyParams) -> None:
        """All are served."""

    def process(self, logits: torch.Tensor, rows: Mapping[int, Row]) -> None:
        if self._sender is not None:
            entropies, _ = entropy_and_log_sum_exp(logits[torch.tensor(list(rows), device=self._device)])
            pairs = zip(rows.values(), entropies.tolist(), strict=True)
            self._sender.send_entropies([(row.params.key, row.step, entropy) for row, entropy in pairs])


class EntropyProcessor(RowProcessor):
    """vLLM's logits processor for rows whose entropies are recorded."""

    work = Entropies
