"""The Hugging Face copy of the model that every scorer reads its weights from."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from agd_vllm.models.architectures import FAMILIES, check_supported
from agd_vllm.models.config_overrides import read_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class HFModel:
    """A frozen causal language model, its decoder stack and the shapes that regions refer to."""

    def __init__(self, architecture: str, model: PreTrainedModel):
        self.architecture = architecture
        self.model = model
        self.stack = attrgetter(FAMILIES[architecture].stack)(model)
        self.config = self.stack.config
        self.unembedding: torch.Tensor = model.get_output_embeddings().weight
        self.device = self.unembedding.device
        self.num_layers: int = self.config.num_hidden_layers
        self.num_heads: int = self.config.num_attention_heads
        self.num_kv_heads: int = self.config.num_key_value_heads
        self.head_dim: int = (
            getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        )


def load_config(
    model_path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[str, PretrainedConfig]:
    """Architecture and config of a local path or Hub id, with `overrides` as for `read_config`.

    Raises ValueError if attribution cannot read such a model.
    """
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = read_config(model_path, overrides=overrides, **source)
    return check_supported(config), config


def load_model(
    model_path: str,
    *,
    dtype: str = "float32",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    overrides: Mapping[str, Any] | None = None,
    attn_implementation: str = "sdpa",
) -> HFModel:
    """Load the weights in `dtype` (float32 or bfloat16; auto: as the checkpoint) on `device` (default: GPU if any).

    `overrides` change the configuration, as for `read_config`.

    Raises ValueError for an unsupported architecture, an unknown dtype, or weights that are not plain matrices.
    """
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    architecture, config = load_config(model_path, overrides=overrides, **source)
    model = AutoModelForCausalLM.from_pretrained(
        model_path,
        config=config,
        dtype=weight_dtype(dtype, config),
        attn_implementation=attn_implementation,
        **source,
    )
    model.requires_grad_(False).eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not module.weight.is_floating_point():
            raise ValueError(f"{name} holds {module.weight.dtype} weights, which cannot be read as a matrix")
    return HFModel(architecture, model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")))


def weight_dtype(name: str, config) -> torch.dtype:
    """The dtype of that name. Raises ValueError for an unknown one."""
    if name == "auto":
        # float16 overflows in the tangents, whose scale the model was never trained to bound.
        return torch.float32 if config.dtype == torch.float32 else torch.bfloat16
    if name not in DTYPES:
        raise ValueError(f"attribution dtype {name!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]
