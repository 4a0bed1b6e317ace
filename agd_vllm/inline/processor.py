"""The one name that vLLM is given for inline attribution's choice, whichever model runner it takes."""

from __future__ import annotations

from typing import Any

from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import LogitsProcessor as LogitsProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from agd_vllm.inline.params import inline_params


class InlineProcessor(LogitsProcessorV1, LogitsProcessorV2):
    """Of both kinds, as each runner's loader takes its own only; what it makes is of the kind that the runner calls."""

    def __new__(cls, vllm_config: VllmConfig, *state: Any):
        if vllm_config.use_v2_model_runner:
            from agd_vllm.inline.processor_v2 import InlineProcessorV2

            return InlineProcessorV2(vllm_config, *state)
        from agd_vllm.inline.processor_v1 import InlineProcessorV1

        return InlineProcessorV1(vllm_config, *state)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        inline_params(sampling_params)
