"""Logits processors over the requests that carry an extra argument of ours, for whichever model runner vLLM takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.sample.logits_processor import LogitsProcessor as LogitsProcessorV1
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from agd_vllm.engine.batch_rows import BatchRow, checked_params, new_row


class Row(NamedTuple):
    """A request in a batch: its parameters, and the output step that is sampled now. In an unfinished chunk of a
    prompt, whose sample vLLM throws away, that is the step after the prompt. `token_ids` gives those of its prompt and
    output so far, int64."""

    params: Any
    step: int
    token_ids: Callable[[], torch.Tensor]


class RowWork(Protocol):
    """What is done to the rows of a batch; `extra_arg` names the requests' extra argument, `kind` its type, which has
    the `prompt_len` of the row's original prompt. Made in the worker: with tensor parallelism every rank has the same
    rows and logits, and one `reports`."""

    extra_arg: ClassVar[str]
    kind: ClassVar[type]

    def __init__(self, device: torch.device, reports: bool): ...

    @staticmethod
    def check(params: Any) -> None:
        """Raises ValueError for parameters that cannot be served."""

    def process(self, logits: torch.Tensor, rows: Mapping[int, Row]) -> None:
        """`logits` [batch, vocabulary], changed in place; `rows` by their place in it. Must never raise, which would
        kill the engine."""


class RowProcessor(LogitsProcessorV1, LogitsProcessorV2):
    """Of both kinds, as each runner's loader takes its own only; what it makes is of the kind that the runner calls."""

    work: ClassVar[type[RowWork]]

    def __new__(cls, vllm_config: VllmConfig, *state: Any):
        return (_OnV2 if vllm_config.use_v2_model_runner else _OnV1)(cls.work, *state)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        params = checked_params(sampling_params, cls.work.extra_arg, cls.work.kind)
        if params is not None:
            cls.work.check(params)


class _OnV1(LogitsProcessorV1):
    def __init__(self, work: type[RowWork], device: torch.device, is_pin_memory: bool):
        self._new_row = new_row(work.extra_arg, work.kind)
        self._rows: dict[int, BatchRow] = {}
        self._device = device
        self._work = work(device, get_tensor_model_parallel_rank() == 0)

    def is_argmax_invariant(self) -> bool:
        # vLLM leaves invariant processors out where all rows are greedy.
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """vLLM calls this before every forward pass."""
        process_dict_updates(self._rows, batch_update, self._new_row)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if self._rows:
            rows = {i: Row(row.params, row.step(), partial(self._token_ids, row)) for i, row in self._rows.items()}
            self._work.process(logits, rows)
        return logits

    def _token_ids(self, row: BatchRow) -> torch.Tensor:
        return torch.tensor(row.token_ids(), device=self._device)


class _OnV2(LogitsProcessorV2):
    def __init__(self, work: type[RowWork], requests: LogitsProcRequestState):
        self._extra_arg, self._kind = work.extra_arg, work.kind
        self._slots: dict[int, Any] = {}
        self._prefill_lens, self._requests = requests.prefill_len.np, requests
        self._work = work(requests.device, get_tensor_model_parallel_rank() == 0)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        params = checked_params(sampling_params, self._extra_arg, self._kind)
        self._slots.pop(req_idx, None)
        if params is not None:
            self._slots[req_idx] = params
        return params is not None

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Without speculative decoding the rows of the logits are the requests of the batch."""
        rows = {}
        for index, slot in enumerate(ctx.idx_mapping_np.tolist()):
            params = self._slots.get(slot)
            if params is not None:
                seen = max(int(ctx.seq_lens_upper_bound_np[index]), int(self._prefill_lens[slot]))
                rows[index] = Row(params, seen - params.prompt_len, partial(self._token_ids, slot, seen))
        if rows:
            self._work.process(logits, rows)
        return logits

    def _token_ids(self, slot: int, seen: int) -> torch.Tensor:
        return self._requests.all_token_ids.gpu[slot, :seen].long()
