"""vLLM's `hf_overrides` on a Hugging Face copy of the model: the same changes of its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from agd_vllm.prompts.template import one_line

# What vLLM's model and Transformers' both read from the configuration while they are made, and in the same way.
# Transformers derives other values while it reads the file, and a later change would leave those as they are.
FOLLOWED = ("rope_parameters", "max_position_embeddings", "rms_norm_eps")
# A model that reads images, too, has a configuration within its own.
NESTED = "text_config"
INSTEAD = "write the change into config.json, in a copy of the model's folder, and name that with --model"


def followed(overrides: Any) -> dict[str, Any]:
    """The part of vLLM's `hf_overrides` that copies follow."""
    if not isinstance(overrides, Mapping):
        return {}
    found = {key: value for key, value in overrides.items() if key in FOLLOWED}
    if nested := followed(overrides.get(NESTED)):
        found[NESTED] = nested
    return found


def check_overrides(overrides: Any) -> None:
    """Raises ValueError, in one line, for `hf_overrides` that copies follow in part only."""
    if not isinstance(overrides, Mapping | None):
        raise ValueError(f"hf_overrides: copies of the model follow a JSON object only; {INSTEAD}")
    for key, value in (overrides or {}).items():
        if key == NESTED and isinstance(value, Mapping):
            check_overrides(value)
        elif key not in FOLLOWED:
            known = ", ".join(FOLLOWED)
            raise ValueError(f"hf_overrides: copies of the model follow {known} only, not {key}; {INSTEAD}")


def read_config(
    path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> PretrainedConfig:
    """A model's configuration with `overrides`, which are `followed`, as vLLM has it (ModelConfig.__post_init__): on
    the top level a value takes the place of the one that was there; within a nested configuration dicts are merged.

    Raises ValueError, in one line, for a value of another type than the configuration's.
    """
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    try:
        for key, value in (overrides or {}).items():
            if key == NESTED and isinstance(getattr(config, NESTED, None), PretrainedConfig):
                _merge(config.text_config, value)
            else:
                setattr(config, key, value)
    except StrictDataclassError as error:
        raise ValueError(f"hf_overrides: {one_line(error)}") from error
    return config


def _merge(target: PretrainedConfig | dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        held = target.get(key) if isinstance(target, dict) else getattr(target, key, None)
        if isinstance(value, Mapping) and isinstance(held, dict):
            _merge(held, value)
        elif isinstance(target, dict):
            target[key] = value
        else:
            setattr(target, key, value)
