"""Which layers DoLa contrasts with, and what vLLM is started with for it."""

from __future__ import annotations

from typing import Any

from agd_vllm.models.class_overrides import class_override
from agd_vllm.models.inspect import ModelInfo

CONFIG = "agd_dola"
CLASSES = {
    name: f"agd_vllm.dola.models:EarlyExits{name}"
    for name in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
}
BUCKETS = ("low", "high")
# Of deeper models the published implementations take the first or last 20 layers as they come.
DEEP, OF_DEEP = 40, 20


def check_layers(layers: str) -> None:
    """Raises ValueError unless `layers` is a bucket or names layers: I,J,... or I+J+..."""
    if layers not in BUCKETS and not all(part.isdecimal() for part in _parts(layers)):
        raise ValueError(f"dola_layers {layers!r}: low, high, or numbers of layers such as 2,4,6")


def candidate_layers(layers: str, num_layers: int, tied: bool) -> list[int]:
    """The numbers of the candidate layers, ascending: 0 is the embeddings, i the stream after layer i.

    `low` and `high` are every other layer of either half; where embeddings and unembedding are `tied` the embeddings
    predict the token itself, and `low` begins at 2 (as Transformers has it). Raises ValueError, in one line.
    """
    if layers in BUCKETS:
        low = layers == "low"
        if num_layers > DEEP:
            return list(range(2 if tied else 0, OF_DEEP, 2) if low else range(num_layers - OF_DEEP, num_layers, 2))
        half = num_layers // 2
        start = 2 if tied else 0
        if not low:
            return list(range(half, num_layers, 2))
        if start > half:
            raise ValueError(f"dola_layers low: a model of {num_layers} layers has none; name layers, or take high")
        return [start] if start == half else list(range(start, half, 2))
    found = sorted({int(part) for part in _parts(layers)})
    if found[-1] >= num_layers:
        raise ValueError(f"dola_layers: layer {found[-1]} is not before the last; the model has {num_layers} layers")
    return found


def engine_args(model: ModelInfo, layers: str, relative_top: float, given: dict[str, Any]) -> dict[str, Any]:
    """vLLM's engine arguments beside the `given` ones.

    Raises ValueError, in one line, for a model, a layer or arguments that it has no code for.
    """
    config, overrides = class_override(model, CLASSES, given, "dola", "with early exits")
    numbers = candidate_layers(layers, config.num_hidden_layers, config.tie_word_embeddings)
    return {
        "model_class_overrides": overrides,
        # Part of the key of vLLM's compile cache.
        "additional_config": {CONFIG: {"layers": numbers, "relative_top": relative_top}},
    }


def _parts(layers: str) -> list[str]:
    return layers.replace("+", ",").split(",")
