"""Tiny random models of every architecture, with what tells them apart: heads, biases, RoPE, windows, ties."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

VOCABULARY = 96

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GEMMA = {**_SHAPE, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": 5}


def configs() -> dict[str, PreTrainedConfig]:
    """Name to config. The sliding windows are shorter than the sequences of the tests."""
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    return {
        "llama": LlamaConfig(**_SHAPE, num_key_value_heads=4, tie_word_embeddings=True),
        "llama-3": LlamaConfig(**_SHAPE, num_key_value_heads=1, rope_parameters=llama3, tie_word_embeddings=False),
        "llama-bias": LlamaConfig(**_SHAPE, num_key_value_heads=2, head_dim=16, attention_bias=True, mlp_bias=True),
        "mistral": MistralConfig(**_SHAPE, num_key_value_heads=2, head_dim=16, sliding_window=6),
        "mistral-full": MistralConfig(**_SHAPE, num_key_value_heads=1, sliding_window=None),
        "qwen2": Qwen2Config(**_SHAPE, num_key_value_heads=2, tie_word_embeddings=True),
        "qwen2-window": Qwen2Config(
            **_SHAPE, num_key_value_heads=4, use_sliding_window=True, sliding_window=5, max_window_layers=1
        ),
        "qwen3": Qwen3Config(**_SHAPE, num_key_value_heads=2, head_dim=16),
        "gemma3": Gemma3TextConfig(**_GEMMA, layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
        "gemma3-multimodal": Gemma3Config(
            text_config=Gemma3TextConfig(
                **_GEMMA, layer_types=["full_attention", "sliding_attention", "full_attention"]
            ),
            vision_config=SiglipVisionConfig(
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                image_size=8,
                patch_size=4,
            ),
            mm_tokens_per_image=4,
        ),
    }


def save(name: str, folder: Path) -> Path:
    """Write the model of that name with seeded random weights, large enough that no rule's term is lost in noise."""
    config = configs()[name]
    torch.manual_seed(sum(name.encode()))
    if isinstance(config, Gemma3Config):
        model = Gemma3ForConditionalGeneration(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif parameter.ndim == 1:
                parameter.copy_(0.5 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.7 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder / name)
    return folder / name
