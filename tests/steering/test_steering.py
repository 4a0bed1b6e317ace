"""Strategy steer on the real vLLM, against forward hooks on the Hugging Face model. Float32 throughout."""

import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch
from command_line import fails
from conftest import CHECKOUT, DEMO_ROWS, RUNNER_V2, plain_job, plain_vllm, prepared_demo_rows, run_plain_jobs
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    RepetitionPenaltyLogitsProcessor,
)

from agd_vllm.models.inspect import ModelInfo
from agd_vllm.steering.arguments import engine_args
from agd_vllm.steering.vector_file import SteeringVectors, write_vectors

WIDTH, LAYERS, STRENGTH, NEW, TOP = 576, (7, 15, 29), 2.0, 24, 20
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
TINY = {
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": Qwen2Config(**{key: value for key, value in SHAPE.items() if key != "head_dim"}),
    "qwen3": Qwen3Config(**SHAPE),
    "gemma3": Gemma3TextConfig(**SHAPE, query_pre_attn_scalar=32, layer_types=["full_attention"] * 3),
}


def write(path, model, layers=LAYERS, width=WIDTH, seed=0, size=4.0):
    generator = torch.Generator().manual_seed(seed)
    drawn = {layer: size * torch.randn(width, generator=generator) for layer in layers}
    write_vectors(str(path), SteeringVectors(drawn, "caa", str(model)))
    return drawn


def info(model, layers=30):
    return ModelInfo(str(model), None, False, frozenset(), None, 1024, 49152, layers, 9)


def hooked(model, vectors, strength, norm):
    """The published form: a hook of a decoder layer that replaces its output."""

    def hook(vector):
        def replace(_module, _inputs, output):
            steered = output + strength * vector
            return steered * output.norm(dim=-1, keepdim=True) / steered.norm(dim=-1, keepdim=True) if norm else steered

        return replace

    for layer, vector in vectors.items():
        model.model.layers[layer].register_forward_hook(hook(vector))
    return model


@torch.no_grad()
def assert_logprobs_are_those_of(model, prompts, decoded):
    """Of the most probable tokens at each step, after the same tokens so far."""
    for prompt, row in zip(prompts, decoded, strict=True):
        logits = model(torch.tensor([prompt + row["token_ids"]])).logits[0, len(prompt) - 1 : -1]
        theirs = logits.log_softmax(-1)
        for step, found in enumerate(row["logprobs"]):
            for token, logprob in found.items():
                assert logprob == pytest.approx(theirs[step, int(token)].item(), abs=1e-3)
            assert theirs[step].max() - theirs[step, row["token_ids"][step]] < 1e-3


@pytest.mark.parametrize("norm", [True, pytest.param(False, marks=pytest.mark.long)])
def test_logits_are_those_of_hooks_on_transformers(smollm2, tmp_path, norm):
    """Prompts in chunks, the rows side by side, against one row at a time."""
    vectors = write(tmp_path / "v.safetensors", smollm2)
    prompts = [row.prompt_token_ids for row in prepared_demo_rows(smollm2, 4, NEW)]
    args = engine_args(info(smollm2), str(tmp_path / "v.safetensors"), norm, {}) | {"steering_strengths": [STRENGTH]}
    rows = [(prompt, {"max_tokens": NEW, "ignore_eos": True, "logprobs": TOP}) for prompt in prompts]
    decoded = plain_vllm(smollm2, rows, tmp_path / "out.json", max_num_batched_tokens=64, **args)
    plain = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with pytest.raises(AssertionError):
        assert_logprobs_are_those_of(plain, prompts, decoded)
    assert_logprobs_are_those_of(hooked(plain, vectors, STRENGTH, norm), prompts, decoded)


def tiny_job(folder, name):
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(TINY[name]).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.9 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    prompts = [torch.randint(3, 96, (length,)).tolist() for length in (9, 21)]
    rows = [(p, {"max_tokens": 12, "ignore_eos": True, "detokenize": False, "logprobs": 5}) for p in prompts]
    return model.eval(), prompts, rows, {"skip_tokenizer_init": True, "max_model_len": 64}


@pytest.mark.long
def test_every_family_is_steered(tmp_path):
    """One after another in one process."""
    made, jobs = [], []
    for name in TINY:
        model, prompts, rows, args = tiny_job(tmp_path / name, name)
        file = tmp_path / f"{name}.safetensors"
        made.append((hooked(model, write(file, name, (0, 2), 64), 1.5, True), prompts))
        args |= engine_args(info(tmp_path / name, 3), str(file), True, {})
        jobs.append(plain_job(tmp_path / name, rows, [1.5], **args))
    for (model, prompts), decoded in zip(made, run_plain_jobs(jobs, tmp_path / "out.json"), strict=True):
        assert_logprobs_are_those_of(model, prompts, decoded)


@pytest.mark.long
def test_model_runner_v2_steers_as_the_other_does(tmp_path, monkeypatch):
    """That of GPUs, its kernels interpreted; prompts in chunks."""
    for variable, value in RUNNER_V2.items():
        monkeypatch.setenv(variable, value)
    model, prompts, rows, args = tiny_job(tmp_path / "llama", "llama")
    vectors = write(tmp_path / "v.safetensors", "llama", (0, 2), 64)
    args |= engine_args(info(tmp_path / "llama", 3), str(tmp_path / "v.safetensors"), True, {})
    chunks = {"max_num_seqs": 8, "max_num_batched_tokens": 16, "steering_strengths": [1.5]}
    decoded = plain_vllm(tmp_path / "llama", rows, tmp_path / "out.json", **args, **chunks)
    with pytest.raises(AssertionError):
        assert_logprobs_are_those_of(model, prompts, decoded)
    assert_logprobs_are_those_of(hooked(model, vectors, 1.5, True), prompts, decoded)


@pytest.mark.long
def test_compiled_models_are_each_their_own(tmp_path, monkeypatch):
    """One compile cache for a model unsteered and steered; one load for all strengths, of which 0 is greedy to the
    token."""
    model, prompts, rows, args = tiny_job(tmp_path / "llama", "llama")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    args |= {"enforce_eager": False}
    greedy = plain_vllm(tmp_path / "llama", rows, tmp_path / "greedy.json", **args)
    assert_logprobs_are_those_of(model, prompts, greedy)
    vectors = write(tmp_path / "v.safetensors", "llama", (0, 2), 64)
    args |= engine_args(info(tmp_path / "llama", 3), str(tmp_path / "v.safetensors"), True, {})
    strengths = [1.5, -1.5, 0.0]
    decoded = plain_vllm(tmp_path / "llama", rows, tmp_path / "steered.json", steering_strengths=strengths, **args)
    for number, strength in enumerate(strengths):
        its = decoded[number * len(rows) :][: len(rows)]
        tokens, plain = ([row["token_ids"] for row in rows] for rows in (its, greedy))
        assert (tokens == plain) == (strength == 0)
        steered = hooked(AutoModelForCausalLM.from_pretrained(tmp_path / "llama"), vectors, strength, True)
        assert_logprobs_are_those_of(steered, prompts, its)
    compiled = [path.parent for path in (tmp_path / "cache/torch_compile_cache").rglob("rank_0_0")]
    assert len(compiled) == 2


def test_the_key_of_the_compile_cache_knows_the_vectors(smollm2, tmp_path):
    from vllm.config import VllmConfig

    def key(seed, norm=True):
        write(tmp_path / "v.safetensors", smollm2, seed=seed)
        args = engine_args(info(smollm2), str(tmp_path / "v.safetensors"), norm, {})
        return VllmConfig(additional_config=args["additional_config"]).compute_hash()

    keys = {VllmConfig().compute_hash(), key(0), key(1), key(1, norm=False)}
    assert len(keys) == 4
    assert key(0) in keys


@pytest.mark.long
def test_the_command_decodes_as_hooks_and_a_penalty_do(smollm2, tmp_path):
    vectors = write(tmp_path / "v.safetensors", smollm2)
    rows = [row for row in map(json.loads, DEMO_ROWS.read_text().splitlines()) if "messages" in row][:4]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row | {"max_tokens": NEW}) + "\n" for row in rows))
    command = [sys.executable, "-m", "agd_vllm", "decode", str(tmp_path / "rows.jsonl")]
    command += ["--output", str(tmp_path / "out"), "--model", str(smollm2), "--dtype", "float32"]
    command += ["--max-model-len", "512", "--strategy", "steer", "--steering", str(tmp_path / "v.safetensors")]
    command += ["--steering-strength", str(STRENGTH), "--no-steering-norm", "--repetition-penalty", "1.2"]
    for arg in ("enforce_eager=true", "kv_cache_memory_bytes=268435456"):
        command += ["--engine-arg", arg]
    subprocess.run(command, cwd=CHECKOUT, check=True)
    model = hooked(AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32), vectors, STRENGTH, False)
    decoded = pq.read_table(tmp_path / "out/results").to_pylist()
    assert len(decoded) == len(rows)
    penalize, eos = RepetitionPenaltyLogitsProcessor(1.2), model.generation_config.eos_token_id
    for row in decoded:
        prompt, tokens = row["prompt_token_ids"], []
        while len(tokens) < NEW and eos not in tokens:
            ids = torch.tensor([prompt + tokens])
            with torch.no_grad():
                logits = model(ids).logits[:, -1]
            tokens.append(int(penalize(ids, logits)[0].argmax()))
        assert row["token_ids"] == tokens, row["id"]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["strategy"], summary["steering_norm"]) == ("steer", False)
    assert summary["steering"].startswith("v.safetensors, ")


@pytest.mark.parametrize(
    ("made", "options", "words"),
    [
        ({"model": "other"}, (), "vectors are of the model other, not of"),
        ({"width": 64}, (), "layer 7 has 64 features, those of"),
        ({"layers": (3, 30)}, (), "--steering: no layer 30; the model has layers 0 to 29"),
        ({}, ("--engine-arg", 'additional_config={"a": 1}'), "additional_config: strategy steer does not work with it"),
        (
            {},
            ("--engine-arg", "worker_extension_cls=a.B"),
            "worker_extension_cls: strategy steer has its own; leave it",
        ),
        (
            {},
            ("--strategy", "agd"),
            "steering: strategy agd has no such option; leave it out, or choose st",
        ),
        ({}, ("--strategy", "agd", "--scorer", "inline"), "steering: strategy agd has no such option"),
        ({}, ("--steering", "nowhere.safetensors"), "nowhere.safetensors does not exist; check the path"),
        ({}, ("--steering", str(DEMO_ROWS)), "not a safetensors file; give a file that `agd-vllm vectors` has written"),
        ({}, ("--steering", ""), "steering is missing; name a file of vectors for strategy steer"),
    ],
)
def test_what_cannot_be_is_said_in_one_line_before_anything_is_loaded(smollm2, tmp_path, capsys, made, options, words):
    write(tmp_path / "v.safetensors", **({"model": smollm2} | made))
    arguments = ["--model", str(smollm2), "--output", str(tmp_path / "out"), "--strategy", "steer"]
    arguments += ["--steering", str(tmp_path / "v.safetensors"), *options]
    assert words in fails(capsys, 2, "decode", str(DEMO_ROWS), *arguments)


def test_a_model_without_such_a_class_is_refused_by_name(tiny_models):
    with pytest.raises(ValueError, match="Gemma3ForConditionalGeneration has no class that steers; it runs Gemma3For"):
        engine_args(info(tiny_models["gemma3-multimodal"]), "v.safetensors", True, {})
