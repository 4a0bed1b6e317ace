"""The model classes that vLLM is given, by `model_class_overrides`, in the place of its own."""

from __future__ import annotations

from agd_vllm.inline.tangent_model import TangentModel
from agd_vllm.models.architectures import INLINE
from agd_vllm.models.class_overrides import vllm_classes

globals().update(vllm_classes(INLINE, TangentModel, __name__))
