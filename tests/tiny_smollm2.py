"""A tiny random Llama with SmolLM2's tokenizer, for runs whose tokens do not matter: it loads in a moment."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def save(smollm2: Path, folder: Path, heads: int) -> Path:
    """In bfloat16, which any dtype can be made of. Its hidden size, 128, is shared by so many `heads`."""
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": heads}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=49152, **shape))
    # Logits so far apart that the gate opens at about every other token, with several candidates.
    model.lm_head.weight.data *= 20
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in TOKENIZER:
        if (smollm2 / name).exists():
            shutil.copy(smollm2 / name, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_smollm2(smollm2, tmp_path_factory) -> Path:
    return save(smollm2, tmp_path_factory.mktemp("tiny smollm2"), heads=2)
