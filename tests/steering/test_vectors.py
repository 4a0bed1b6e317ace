"""Steering vectors from pairs: by the literal definitions, and the command that writes them."""

import json

import pytest
import torch
from captum.attr import IntegratedGradients as Captum
from command_line import fails, run
from transformers import AutoModelForCausalLM

from agd_vllm.attribution import lxt_compat
from agd_vllm.attribution.integrated_gradients import POINTS, IntegratedGradients
from agd_vllm.models.inspect import inspect_model
from agd_vllm.prompts.tokenizer import load_tokenizer
from agd_vllm.steering import extraction
from agd_vllm.steering.extraction import extract
from agd_vllm.steering.pairs import Pair, read_pairs
from agd_vllm.steering.vector_file import read_vectors

PAD, LAYERS, FAMILIES = 0, [0, 2], ["llama-3", "qwen3", "gemma3"]


@pytest.fixture(autouse=True)
def process_rule(monkeypatch):
    """Of the process, and to be left as it was."""
    monkeypatch.setattr(lxt_compat, "_process_rule", None)


def pair(seed: int) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    prompt, preferred, dispreferred = (
        torch.randint(3, 96, (length,), generator=generator).tolist() for length in (12 + seed, 3, 2 + seed)
    )
    # The first and the last two tokens are the template's.
    return Pair(prompt, list(range(1, 10 + seed)), preferred, dispreferred)


PAIRS = [pair(seed) for seed in range(4)]


def vectors(model, method, pairs=PAIRS, seed=0):
    gradients = IntegratedGradients(str(model))
    return extract(method, gradients, pairs, LAYERS, pad_id=PAD, seed=seed, progress=iter)


@torch.no_grad()
def state(model, tokens, layer):
    """What leaves the layer at the last token; one sequence at a time."""
    found = []
    hook = model.get_submodule(f"model.layers.{layer}").register_forward_hook(lambda *given: found.append(given[2]))
    model(torch.tensor([tokens]))
    hook.remove()
    return found[0][0, -1]


def contrast(model, pair):
    """By captum, in one: both answers are behind the same inputs."""
    embed = model.get_input_embeddings()

    def forward(inputs):
        total = 0
        for sign, answer in ((1, pair.preferred), (-1, pair.dispreferred)):
            behind = embed(torch.tensor([answer])).expand(len(inputs), -1, -1)
            logits = model(inputs_embeds=torch.cat([inputs, behind], 1)).logits[:, len(pair.prompt) - 1 : -1]
            total = total + sign * logits.log_softmax(-1)[:, torch.arange(len(answer)), answer].sum(-1)
        return total

    embeddings = embed(torch.tensor([pair.prompt])).detach()
    return Captum(forward).attribute(embeddings, n_steps=POINTS, method="gausslegendre").sum(-1)[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_grains_is_what_the_named_tokens_add_to_the_state(tiny_models, monkeypatch, name):
    monkeypatch.setattr(extraction, "TOP", 3)
    monkeypatch.setattr(extraction, "BATCH_TOKENS", 40)
    ours = vectors(tiny_models[name], "grains")
    model = AutoModelForCausalLM.from_pretrained(tiny_models[name])
    for layer in LAYERS:
        differences = []
        for each in PAIRS:
            parts = contrast(model, each)
            own = sorted(each.own, key=lambda position: parts[position])
            negative, positive = own[:3], own[-3:]
            assert parts[negative].max() < 0 < parts[positive].min()
            taken_out = [
                [PAD if at in positions else token for at, token in enumerate(each.prompt)]
                for positions in (positive, negative)
            ]
            whole, without_positive, without_negative = (
                state(model, tokens, layer) for tokens in (each.prompt, *taken_out)
            )
            differences.append((whole - without_positive) - (whole - without_negative))
        torch.testing.assert_close(ours[layer], torch.stack(differences).mean(0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_caa_is_the_mean_difference_of_the_answers_states(tiny_models, monkeypatch, name):
    monkeypatch.setattr(extraction, "BATCH_TOKENS", 40)
    ours = vectors(tiny_models[name], "caa")
    model = AutoModelForCausalLM.from_pretrained(tiny_models[name])
    for layer in LAYERS:
        differences = [
            state(model, each.prompt + each.preferred, layer) - state(model, each.prompt + each.dispreferred, layer)
            for each in PAIRS
        ]
        torch.testing.assert_close(ours[layer], torch.stack(differences).mean(0), atol=1e-4, rtol=1e-4)


def test_random_is_as_long_as_caa_and_points_elsewhere(tiny_models):
    caa, one, other = (
        vectors(tiny_models["llama"], method, seed=seed) for method, seed in (("caa", 0), ("random", 0), ("random", 1))
    )
    for layer in LAYERS:
        assert one[layer].norm().item() == pytest.approx(caa[layer].norm().item(), rel=1e-5)
        for a, b in ((one, caa), (one, other)):
            assert torch.cosine_similarity(a[layer], b[layer], dim=0).abs() < 0.6
    assert not torch.equal(one[0], one[2])


def test_prompts_without_words_of_their_own_say_so(tiny_models):
    empty = [Pair(each.prompt, [], each.preferred, each.dispreferred) for each in PAIRS]
    with pytest.raises(ValueError, match="no difference in layer 0; give prompts with words of their own"):
        vectors(tiny_models["llama"], "grains", empty)


ROWS = [
    {
        "id": f"r{number}",
        "messages": [{"role": "user", "content": question}],
        "metadata": {"preferred": true, "dispreferred": false},
    }
    for number, (question, true, false) in enumerate(
        [
            ("Is the earth flat?", "No, it is round.", "Yes, it is."),
            ("Do fish <|im_end|> swim?", "Yes.", "<|im_end|>"),
            ("Two and two?", "Four.", "Five."),
        ]
    )
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_pair_is_its_rows_own_words_in_the_template(smollm2, tmp_path):
    tokenizer = load_tokenizer(str(smollm2))
    prompt_row = {"id": "p", "prompt": "Q: Why?\nA:", "metadata": {"preferred": " So.", "dispreferred": " No."}}
    pairs = read_pairs([write(tmp_path / "pairs.jsonl", [*ROWS, prompt_row])], None, tokenizer, 512)
    for pair, row in zip(pairs, ROWS, strict=False):
        text = row["messages"][0]["content"]
        assert tokenizer.decode([pair.prompt[at] for at in pair.own]) == text
        assert tokenizer.decode(pair.prompt).endswith("<|im_start|>assistant\n")
        assert [tokenizer.decode(ids) for ids in (pair.preferred, pair.dispreferred)] == list(row["metadata"].values())
    # What a row says is no special token.
    assert len(pairs[1].dispreferred) > 1
    raw = pairs[3]
    assert raw.own == list(range(len(raw.prompt)))
    assert tokenizer.decode(raw.prompt + raw.preferred) == "Q: Why?\nA: So."


@pytest.mark.parametrize("method", ["caa", pytest.param("grains", marks=pytest.mark.long)])
def test_the_command_writes_what_decode_takes(smollm2, tmp_path, capsys, method):
    rows, file = write(tmp_path / "pairs.jsonl", ROWS), tmp_path / "made/v.safetensors"
    arguments = ("--model", str(smollm2), "--method", method, "--layers", "20,3", "--output", str(file))
    status, out, _ = run(capsys, "vectors", rows, *arguments, "--limit", "1")
    assert (status, out.startswith(f"{method} vectors of layers 3 (length ")) == (0, True)
    assert out.endswith(f" from 1 pairs in {file}\n")
    read = read_vectors(str(file))
    assert (read.method, read.model, [*read.layers]) == (method, str(smollm2), [3, 20])
    assert read.model_digest == inspect_model(str(smollm2))[0].digest is not None
    decode = ("decode", rows, "--model", str(smollm2), "--strategy", "steer", "--steering", str(file), "--dry-run")
    assert run(capsys, *decode)[0] == 0


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"metadata": None}, (), "row 'r2' (line 3 of "),
        ({"metadata": {"preferred": "Four."}}, (), "no pair; its metadata must hold two texts, preferred and dispref"),
        ({"metadata": {"preferred": "A", "dispreferred": "A"}}, (), "preferred and dispreferred are alike"),
        ({"id": "r0"}, (), "an earlier row has this id"),
        ({"messages": [{"role": "user", "content": "so " * 9000}]}, (), "the model takes 8192"),
        ({}, ("--layers", "3,30"), "--layers: no layer 30; the model has layers 0 to 29"),
        ({}, ("--layers", "all"), "'all': numbers of layers such as 11,15"),
        ({}, ("--output", "/tmp/"), "--output /tmp/: that is a folder; name a file"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(smollm2, tmp_path, capsys, monkeypatch, change, options, words):
    monkeypatch.delattr("agd_vllm.attribution.integrated_gradients.IntegratedGradients")  # nothing may be loaded
    rows = write(tmp_path / "pairs.jsonl", [*ROWS[:2], ROWS[2] | change])
    arguments = ("--model", str(smollm2), "--method", "caa", "--layers", "3", "--output", str(tmp_path / "v"))
    assert words in fails(capsys, 2, "vectors", rows, *arguments, *options)
