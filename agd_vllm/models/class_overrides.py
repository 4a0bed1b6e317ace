"""Model classes of ours in the place of vLLM's, for the strategies that need one."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from agd_vllm.models.architectures import FAMILIES
from agd_vllm.models.inspect import ModelInfo

# Engine arguments that no such class has code for, and the values that ask for nothing.
WITHOUT = {
    "pipeline_parallel_size": 1,
    "enable_lora": False,
    "model_class_overrides": {},
    "additional_config": {},
}


def class_names(work: str) -> dict[str, str]:
    """Of each family that has a class for this work: its architecture, and that class as module:class."""
    modules = {"inline": "agd_vllm.inline.models", "dola": "agd_vllm.dola.models", "steer": "agd_vllm.steering.models"}
    return {
        name: f"{modules[work]}:{work.capitalize()}{name}" for name, family in FAMILIES.items() if work in family.works
    }


def vllm_classes(work: str, mixin: type, module: str) -> dict[str, type]:
    """The classes that `class_names` names, by name: `mixin` before vLLM's class of each family. For the `module` that
    has them, to add to its names."""
    made = {}
    for architecture in class_names(work):
        of_vllm = importlib.import_module(f"vllm.model_executor.models.{FAMILIES[architecture].vllm}")
        name = f"{work.capitalize()}{architecture}"
        made[name] = type(
            name, (mixin, getattr(of_vllm, architecture)), {"__module__": module, "__doc__": mixin.__doc__}
        )
    return made


def class_override(
    model: ModelInfo, work: str, given: Mapping[str, Any], does: str
) -> tuple[PretrainedConfig, dict[str, str]]:
    """The model's config, and vLLM's `model_class_overrides` with the class of ours for the strategy named as `work`.

    Raises ValueError, in one line, for an architecture that none of them `does` it for, and for `given` engine
    arguments that they have no code for.
    """
    classes = class_names(work)
    for key, nothing in WITHOUT.items():
        if given.get(key, nothing) != nothing:
            raise ValueError(f"--engine-arg {key}: strategy {work} does not work with it; leave it out")
    config = AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    name = next((name for name in config.architectures or () if name in classes), None)
    if name is None:
        named = ", ".join(config.architectures or ("an unnamed architecture",))
        raise ValueError(f"strategy {work}: {named} has no class {does}; it runs {', '.join(classes)}")
    return config, {name: classes[name]}
