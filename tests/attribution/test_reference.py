"""The reference scorer: its patches change what they must, its relevances add up to its scores."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

HERE = Path(__file__).parent
MODELS = sorted(tiny.configs())

# Runs in a process of its own, because lxt patches classes for a whole process.
RELEVANCE = """
import json, random, sys
import tiny
from agd_vllm.attribution.reference import ReferenceScorer
from agd_vllm.records import Roi, ScoreRequest, Span

rule, models = sys.argv[1], json.loads(sys.argv[2])
results = {}
for name, path in models.items():
    scorer, rng = ReferenceScorer(path, rule=rule), random.Random(3)
    tokens = [rng.randrange(3, tiny.VOCABULARY) for _ in range(24)]
    targets = [(23, 5), (23, 6), (11, 7)]
    relevances = scorer.relevance(tokens, targets)
    results[name] = {"relevance": [r.tokens for r in relevances], "logit": [r.logit for r in relevances]}
    results[name]["heads"] = scorer.head_relevance(tokens, targets).tolist()
    roi = Roi((Span(2, 8, 0.5), Span(5, 10, -1.0)))
    results[name]["scores"] = [
        scorer.score([ScoreRequest("s", 0, tokens[: position + 1], roi, (target,))])[0][0]
        for position, target in targets
    ]
print(json.dumps(results))
"""

# Gradient x input of the untouched Transformers model, by nothing but autograd.
PLAIN_GRADIENT = """
import json, random, sys
import tiny, torch
from transformers import AutoModelForCausalLM

results = {}
for name, path in json.loads(sys.argv[2]).items():
    model, rng = AutoModelForCausalLM.from_pretrained(path), random.Random(3)
    ids = torch.tensor([[rng.randrange(3, tiny.VOCABULARY) for _ in range(24)]])
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    outputs = []
    for module_name, module in model.named_modules():
        if module_name.endswith("self_attn.o_proj") and "vision" not in module_name:
            module.register_forward_pre_hook(lambda _module, inputs: outputs.append(inputs[0]))
    logits = model(inputs_embeds=embeddings, attention_mask=torch.ones_like(ids)).logits[0]
    results[name] = {"relevance": [], "logit": []}
    for position, target in [(23, 5), (23, 6), (11, 7)]:
        (gradient,) = torch.autograd.grad(logits[position, target], embeddings, retain_graph=True)
        results[name]["relevance"].append((gradient * embeddings)[0, : position + 1].sum(-1).tolist())
        results[name]["logit"].append(logits[position, target].item())
    gradients = torch.autograd.grad(logits[[23, 23, 11], [5, 6, 7]].sum(), outputs)
    results[name]["heads"] = [
        (gradient * output)[0].reshape(24, 4, -1).relu().sum((0, 2)).tolist()
        for gradient, output in zip(gradients, outputs)
    ]
print(json.dumps(results))
"""


def run(program: str, rule: str, models: dict[str, Path]) -> dict:
    command = [sys.executable, "-c", program, rule, json.dumps({name: str(path) for name, path in models.items()})]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=HERE)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return {name: tiny.save(name, folder) for name in MODELS}


@pytest.fixture(scope="module")
def relevances(models) -> dict[str, dict]:
    return {rule: run(RELEVANCE, rule, models) for rule in ("attnlrp", "cplrp", "ixg")}


@pytest.fixture(scope="module")
def plain(models) -> dict:
    return run(PLAIN_GRADIENT, "none", models)


@pytest.mark.parametrize("rule", ["attnlrp", "cplrp", "ixg"])
@pytest.mark.parametrize("name", MODELS)
def test_a_score_is_the_weighted_sum_of_the_relevance_of_its_region(relevances, rule, name):
    found = relevances[rule][name]
    weights = [0.5 * (2 <= position < 8) - 1.0 * (5 <= position < 10) for position in range(24)]
    for relevance, score in zip(found["relevance"], found["scores"], strict=True):
        expected = sum(weight * r for weight, r in zip(weights, relevance, strict=False))
        assert score == pytest.approx(expected, abs=1e-5 * max(map(abs, relevance)))


@pytest.mark.parametrize("name", MODELS)
def test_a_target_is_explained_by_the_tokens_up_to_its_position(relevances, name):
    assert [len(relevance) for relevance in relevances["attnlrp"][name]["relevance"]] == [24, 24, 12]


@pytest.mark.parametrize("name", MODELS)
def test_patches_leave_the_logits_alone(relevances, plain, name):
    for rule in relevances:
        assert relevances[rule][name]["logit"] == pytest.approx(plain[name]["logit"], abs=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_ixg_is_the_plain_gradient_times_input(relevances, plain, name):
    for ours, theirs in zip(relevances["ixg"][name]["relevance"], plain[name]["relevance"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5 * max(map(abs, theirs)))


@pytest.mark.parametrize("name", MODELS)
def test_relevance_of_heads_is_what_their_outputs_add_to_the_targets(relevances, plain, name):
    ours, theirs = relevances["ixg"][name]["heads"], plain[name]["heads"]
    assert (len(ours), len(ours[0])) == (3, 4)
    for layer, expected in zip(ours, theirs, strict=True):
        assert layer == pytest.approx(expected, rel=1e-3)
    assert relevances["attnlrp"][name]["heads"] != ours


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("llama-bias", "qwen2", "qwen2-window")])
def test_cplrp_conserves_relevance_where_there_are_no_biases(relevances, name):
    """What holds constant leaves a network linear in its input, so an unpatched norm, gate or attention would show."""
    found = relevances["cplrp"][name]
    for relevance, logit in zip(found["relevance"], found["logit"], strict=True):
        assert sum(relevance) == pytest.approx(logit, abs=1e-4)


def test_a_process_serves_one_rule(models):
    program = """
import json, sys
from agd_vllm.attribution.reference import ReferenceScorer
first, second = list(json.loads(sys.argv[2]).values())[:2]
ReferenceScorer(first, rule="attnlrp"), ReferenceScorer(second, rule="attnlrp")
try:
    ReferenceScorer(first, rule="ixg")
except RuntimeError as error:
    print(json.dumps(str(error)))
"""
    message = run(program, "none", models)
    assert "attnlrp" in message and "ixg" in message and "process" in message
