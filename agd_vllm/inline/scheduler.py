"""vLLM's schedulers, which see a request, its parameters and its prompt's salt together: they give it the salt of its
region, and end what the model cannot do.

Cached blocks hold the tangents of one region. A request whose prompt was not salted so, by whatever way it came, would
read those of another region.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from agd_vllm.attribution.regions import check_roi
from agd_vllm.inline.arguments import rule_name
from agd_vllm.inline.params import InlineParams, inline_params


class _OfRegions:
    """Before a scheduler of vLLM's."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any):
        super().__init__(vllm_config, *args, **kwargs)
        config = vllm_config.model_config.hf_text_config
        self._rule = rule_name(vllm_config)
        self._vocabulary = vllm_config.model_config.get_vocab_size()
        self._size = {"num_layers": config.num_hidden_layers, "num_heads": config.num_attention_heads}
        self._refused: list[tuple[int, EngineCoreOutput]] = []

    def add_request(self, request: Request) -> None:
        try:
            params = self._params_of(request)
        except ValueError as error:
            super().add_request(request)
            self._refuse(request, f"{error}")
            return
        if params is not None and request.cache_salt != params.salt:
            request.cache_salt = params.salt
            request.block_hashes.clear()
            request.update_block_hashes()
        super().add_request(request)

    def _params_of(self, request: Request) -> InlineParams | None:
        """Raises ValueError for what would be an error in the worker, which is the end of the engine, or would give an
        answer that is not that of the request."""
        params = None if request.sampling_params is None else inline_params(request.sampling_params)
        if params is None:
            return None
        if params.rule != self._rule:
            raise ValueError(f"rule {params.rule}: this engine was started with {self._rule}")
        if params.top_k > self._vocabulary:
            raise ValueError(f"top_k {params.top_k}: the model has {self._vocabulary} tokens")
        check_roi(params.roi, num_tokens=request.num_prompt_tokens, **self._size)
        return params

    def _refuse(self, request: Request, reason: str) -> None:
        """Ends the request before it is scheduled; the client reads `reason` as its stop_reason."""
        request_id, client = request.request_id, request.client_index
        self.finish_requests(request_id, RequestStatus.FINISHED_ERROR)
        output = EngineCoreOutput(request_id, [], finish_reason=request.get_finished_reason(), stop_reason=reason)
        self._refused.append((client, output))

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, EngineCoreOutputs]:
        outputs = super().update_from_output(*args, **kwargs)
        for client, output in self._refused:
            outputs.setdefault(client, EngineCoreOutputs()).outputs.append(output)
        self._refused.clear()
        return outputs


class _Stepwise(_OfRegions, Scheduler):
    pass


class _Asynchronous(_OfRegions, AsyncScheduler):
    pass


class InlineScheduler:
    """The one name that vLLM is given; what it makes is of the kind that vLLM would have taken."""

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any):
        kind = _Asynchronous if vllm_config.scheduler_config.async_scheduling else _Stepwise
        return kind(vllm_config, *args, **kwargs)
