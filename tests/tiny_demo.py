"""A tiny model with SmolLM2's tokenizer, for runs whose tokens do not matter."""

import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

OF_THE_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@pytest.fixture(scope="session")
def tiny_demo(smollm2, tmp_path_factory):
    """Four layers of 128 features, seeded: the model of `tests/interrupted_runs`."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in (*OF_THE_TOKENIZER, "generation_config.json"):
        if (smollm2 / name).exists():
            shutil.copy(smollm2 / name, folder)
    return folder
