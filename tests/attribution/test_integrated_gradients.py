"""Integrated gradients against captum's, complete, and exact where the answer is known by hand."""

from operator import itemgetter

import pytest
import torch
from captum.attr import IntegratedGradients as Captum
from tiny_oracle import MODELS
from transformers import AutoModelForCausalLM

from agd_vllm.attribution import lxt_compat
from agd_vllm.attribution.integrated_gradients import POINTS, IntegratedGradients
from agd_vllm.attribution.scorer import load_scorer

TOKENS = [(7 * number * number + 3) % 90 + 3 for number in range(24)]
TARGETS = [(23, 5), (23, 6), (11, 7)]
NAMES = [name for name in MODELS if name != "gemma3-multimodal"]


@pytest.fixture
def load(tiny_models, monkeypatch):
    monkeypatch.setattr(lxt_compat, "_process_rule", None)
    return lambda name: load_scorer("lxt", str(tiny_models[name]), rule="ig")


def captum(model, ids, outputs, scaled):
    """By captum: the embeddings of the first `scaled` tokens are the input, the others are given beside it."""
    embeddings = model.get_input_embeddings()(torch.tensor([ids])).detach()

    def forward(inputs, rest):
        return outputs(model(inputs_embeds=torch.cat([inputs, rest], 1)).logits)

    found = Captum(forward).attribute(
        embeddings[:, :scaled],
        additional_forward_args=embeddings[:, scaled:],
        n_steps=POINTS,
        method="gausslegendre",
    )
    return found.sum(-1)[0].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_relevance_is_captums(load, tiny_models, name):
    ours = load(name).relevance(TOKENS, TARGETS)
    model = AutoModelForCausalLM.from_pretrained(tiny_models[name])
    for relevance, (position, target) in zip(ours, TARGETS, strict=True):
        theirs = captum(model, TOKENS, itemgetter((slice(None), position, target)), len(TOKENS))
        assert relevance.tokens == pytest.approx(theirs[: position + 1], abs=1e-4)
        assert not any(theirs[position + 1 :])
        plain = model(torch.tensor([TOKENS])).logits[0, position, target].item()
        assert relevance.logit == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize("name", ["llama-3", "gemma3"])
def test_an_answer_is_explained_by_its_prompt_as_captum_does(load, tiny_models, name, monkeypatch):
    # A few points a pass, and not as many in the last.
    monkeypatch.setattr("agd_vllm.attribution.integrated_gradients.MAX_BATCH_TOKENS", 7 * len(TOKENS))
    explained = load(name).answer(TOKENS[:18], TOKENS[18:])
    model = AutoModelForCausalLM.from_pretrained(tiny_models[name])

    def log_probability(logits):
        answer = torch.tensor(TOKENS[18:])
        return logits[:, 17:-1].log_softmax(-1)[:, torch.arange(6), answer].sum(-1)

    theirs = captum(model, TOKENS, log_probability, 18)
    assert explained.tokens.tolist() == pytest.approx(theirs, abs=1e-4)
    expected = log_probability(model(torch.tensor([TOKENS])).logits).item()
    assert explained.log_probability == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_parts_add_up_to_what_the_tokens_change(load, name):
    """Completeness: F(x) - F(0), to 1 % of the largest such change. With norms that are smooth at nothing: a small
    epsilon makes a step there of what no number of points sees."""
    found = load(name)
    for module in found.hf.model.modules():
        for epsilon in {"variance_epsilon", "eps"} & vars(module).keys():
            setattr(module, epsilon, 0.3)
    with torch.no_grad():
        without = found._hidden(torch.zeros(1, len(TOKENS), found.hf.config.hidden_size))[0]
    parts = found.relevance(TOKENS, TARGETS)
    changes = [
        relevance.logit - (without[position] @ found.hf.unembedding[target]).item()
        for relevance, (position, target) in zip(parts, TARGETS, strict=True)
    ]
    for relevance, change in zip(parts, changes, strict=True):
        assert sum(relevance.tokens) == pytest.approx(change, abs=0.01 * max(map(abs, changes)))


def test_a_linear_model_is_explained_exactly(load, monkeypatch):
    """Each token's part is then its own product with the weights, whatever the points."""
    found = load("llama-bias")
    monkeypatch.setattr(IntegratedGradients, "_hidden", lambda self, embeddings: embeddings.cumsum(1))
    embeddings = found.hf.stack.embed_tokens(torch.tensor(TOKENS))
    for relevance, (position, target) in zip(found.relevance(TOKENS, TARGETS), TARGETS, strict=True):
        expected = embeddings[: position + 1] @ found.hf.unembedding[target]
        assert relevance.tokens == pytest.approx(expected.tolist(), abs=1e-5)
        assert relevance.logit == pytest.approx(expected.sum().item(), abs=1e-5)


def test_it_shares_no_process_with_patched_classes(load, tiny_models, monkeypatch):
    monkeypatch.setattr(lxt_compat, "_process_rule", "attnlrp")
    with pytest.raises(RuntimeError, match="already attributes with rule 'attnlrp'"):
        load("llama")
