"""The model classes that vLLM is given, by `model_class_overrides`, in the place of its own."""

from __future__ import annotations

from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from agd_vllm.inline.tangent_model import TangentModel


class InlineGemma3ForCausalLM(TangentModel, Gemma3ForCausalLM):
    pass


class InlineLlamaForCausalLM(TangentModel, LlamaForCausalLM):
    pass


class InlineMistralForCausalLM(TangentModel, MistralForCausalLM):
    pass


class InlineQwen2ForCausalLM(TangentModel, Qwen2ForCausalLM):
    pass


class InlineQwen3ForCausalLM(TangentModel, Qwen3ForCausalLM):
    pass
