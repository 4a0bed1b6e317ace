"""What vLLM is started with for DoLa."""

from __future__ import annotations

from typing import Any

from agd_vllm.dola.layers import candidate_layers
from agd_vllm.models.architectures import DOLA
from agd_vllm.models.class_overrides import class_override
from agd_vllm.models.inspect import ModelInfo

CONFIG = "agd_dola"


def engine_args(model: ModelInfo, layers: str, relative_top: float, given: dict[str, Any]) -> dict[str, Any]:
    """vLLM's engine arguments beside the `given` ones.

    Raises ValueError, in one line, for a model, a layer or arguments that it has no code for.
    """
    config, overrides = class_override(model, DOLA, given, "with early exits")
    numbers = candidate_layers(layers, config.num_hidden_layers, config.tie_word_embeddings)
    return {
        "model_class_overrides": overrides,
        # Part of the key of vLLM's compile cache.
        "additional_config": {CONFIG: {"layers": numbers, "relative_top": relative_top}},
    }
