"""A model class of ours in the place of vLLM's, for a strategy that needs one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from agd_vllm.models.inspect import ModelInfo

# Engine arguments that no such class has code for, and the values that ask for nothing.
WITHOUT = {
    "pipeline_parallel_size": 1,
    "enable_lora": False,
    "model_class_overrides": {},
    "additional_config": {},
}


def class_override(
    model: ModelInfo, classes: Mapping[str, str], given: Mapping[str, Any], strategy: str, does: str
) -> tuple[PretrainedConfig, dict[str, str]]:
    """The model's config, and vLLM's `model_class_overrides` with its one of `classes` (architecture to module:class).

    Raises ValueError, in one line, for an architecture that none of them `does` it for, and for `given` engine
    arguments that they have no code for.
    """
    for key, nothing in WITHOUT.items():
        if given.get(key, nothing) != nothing:
            raise ValueError(f"--engine-arg {key}: strategy {strategy} does not work with it; leave it out")
    config = AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    name = next((name for name in config.architectures or () if name in classes), None)
    if name is None:
        named = ", ".join(config.architectures or ("an unnamed architecture",))
        raise ValueError(f"strategy {strategy}: {named} has no class {does}; it runs {', '.join(classes)}")
    return config, {name: classes[name]}
