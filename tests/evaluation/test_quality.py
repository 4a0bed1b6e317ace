"""Perplexity against a computation text by text, repetition on texts whose rate is known."""

import math
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from agd_vllm.evaluation import quality
from agd_vllm.evaluation.quality import PerplexityModel, repetition_rate


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.5,
        )
    )
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder, model


def one_by_one(model, texts):
    losses = []
    for prompt, generated in texts:
        logits = model(torch.tensor([prompt + generated])).logits[0].log_softmax(-1)
        losses += [-logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(generated)]
    return math.exp(sum(losses) / len(losses))


def test_perplexity_counts_every_generated_token_once(tiny_llama, monkeypatch):
    folder, model = tiny_llama
    rng = random.Random(0)
    texts = [
        ([rng.randrange(50) for _ in range(prompt)], [rng.randrange(50) for _ in range(generated)])
        for prompt, generated in ((1, 9), (7, 1), (12, 30), (3, 0), (20, 5), (4, 17))
    ]
    others = [(prompt, [rng.randrange(50) for _ in range(rng.randrange(25))]) for prompt, _ in texts]
    expected = {"ours": one_by_one(model, texts), "others": one_by_one(model, others)}
    loaded = PerplexityModel(str(folder), dtype="float32")
    assert loaded.dtype == "float32"
    for tokens in (1, 48, 2048):
        monkeypatch.setattr(quality, "MAX_BATCH_TOKENS", tokens)
        found = loaded.perplexities({"ours": texts, "others": others, "nothing": [([1], [])]})
        assert found.pop("nothing") is None
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [([], 0), ([1, 2, 3], 0), (list(range(20)), 0), ([7] * 13, 0.9), ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5)],
)
def test_repetition(tokens, rate):
    assert repetition_rate(tokens) == pytest.approx(rate)
