"""Strategy dola on the real vLLM: the recorded generations, and a literal loop on the Hugging Face model."""

import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch
from command_line import fails
from conftest import CHECKOUT, DEMO_ROWS, RUNNER_V2, plain_job, run_plain_jobs
from dola_recorded import RECORDED, model
from transformers import AutoModelForCausalLM, RepetitionPenaltyLogitsProcessor

from agd_vllm.dola.arguments import candidate_layers, engine_args
from agd_vllm.dola.contrast import REMOVED
from agd_vllm.models.inspect import ModelInfo

GENERATIONS = RECORDED["generations"]


def test_vllm_generates_what_was_recorded(tmp_path):
    """All models one after another in one process; the engine in processes of its own: the command below."""
    jobs = [job(tmp_path / f"{number}", entry) for number, entry in enumerate(GENERATIONS)]
    for entry, decoded in zip(GENERATIONS, run_plain_jobs(jobs, tmp_path / "out.json"), strict=True):
        assert [row["token_ids"] for row in decoded] == [row["tokens"] for row in entry["rows"]]


@pytest.mark.long
def test_model_runner_v2_generates_what_was_recorded(tmp_path, monkeypatch):
    """That of GPUs, its kernels interpreted; prompts in chunks."""
    for name, value in RUNNER_V2.items():
        monkeypatch.setenv(name, value)
    asked = job(tmp_path / "model", GENERATIONS[0], max_num_seqs=8, max_num_batched_tokens=16)
    (decoded,) = run_plain_jobs([asked], tmp_path / "out.json")
    assert [row["token_ids"] for row in decoded] == [row["tokens"] for row in GENERATIONS[0]["rows"]]


def job(folder, entry, **engine_arguments):
    """What decodes an entry's rows on its model, which is written to `folder`."""
    model(entry).save_pretrained(folder)
    layers = entry["dola_layers"]
    named = layers if isinstance(layers, str) else "+".join(map(str, layers))
    info = ModelInfo(str(folder), None, False, frozenset(), None, 128, 512, 8, 2)
    args = engine_args(info, named, 0.1, {}) | {"skip_tokenizer_init": True, "max_model_len": 128}
    rows = [(row["prompt"], {"max_tokens": len(row["tokens"]), "detokenize": False}) for row in entry["rows"]]
    return plain_job(folder, rows, **args | engine_arguments)


@pytest.mark.long
@pytest.mark.parametrize("penalty", [1.2, 1.0])
def test_the_command_decodes_as_a_literal_loop_does(smollm2, tmp_path, penalty):
    """Prompts in chunks, the rows side by side, against one row at a time."""
    layers, relative_top, new = "4,10,20", 0.2, 24
    rows = [row for row in map(json.loads, DEMO_ROWS.read_text().splitlines()) if "messages" in row][:6]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row | {"max_tokens": new}) + "\n" for row in rows))
    command = [sys.executable, "-m", "agd_vllm", "decode", str(data), "--output", str(tmp_path / "out")]
    command += ["--model", str(smollm2), "--dtype", "float32", "--max-model-len", "512", "--strategy", "dola"]
    command += ["--dola-layers", layers, "--dola-relative-top", str(relative_top)]
    command += ["--repetition-penalty", str(penalty)]
    for arg in ("enforce_eager=true", "kv_cache_memory_bytes=268435456", "max_num_batched_tokens=64"):
        command += ["--engine-arg", arg]
    subprocess.run(command, cwd=CHECKOUT, check=True)
    llama = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    decoded = pq.read_table(tmp_path / "out/results").to_pylist()
    assert len(decoded) == len(rows)
    eos = llama.generation_config.eos_token_id
    for row in decoded:
        theirs = literal(llama, row["prompt_token_ids"], [4, 10, 20], relative_top, new, eos, penalty)
        assert row["token_ids"] == theirs, row["id"]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["strategy"], summary["dola_layers"], summary["guided_steps"]) == ("dola", layers, 0)


@torch.no_grad()
def literal(llama, prompt, layers, relative_top, new, eos, penalty) -> list[int]:
    """As the published implementations write it, for one row."""
    tokens, penalize = [], RepetitionPenaltyLogitsProcessor(penalty)
    while len(tokens) < new and eos not in tokens:
        output = llama(torch.tensor([prompt + tokens]), output_hidden_states=True)
        mature = output.logits[0, -1].log_softmax(-1)
        early = [llama.lm_head(output.hidden_states[layer][0, -1]).log_softmax(-1) for layer in layers]
        divergences = []
        for layer in early:
            mixture = ((mature.exp() + layer.exp()) / 2).log()
            to_mature, to_layer = (mixture.exp() * (mixture - other) for other in (mature, layer))
            divergences.append(to_mature.sum() / 2 + to_layer.sum() / 2)
        premature = early[torch.stack(divergences).argmax()]
        removed = mature.exp() < relative_top * mature.exp().max()
        scores = penalize(torch.tensor([prompt + tokens]), (mature - premature)[None])[0]
        tokens.append(int(scores.masked_fill(removed, -REMOVED).argmax()))
    return tokens


def test_buckets_are_those_of_the_published_implementations():
    assert candidate_layers("low", 32, False) == list(range(0, 16, 2))
    assert candidate_layers("high", 32, True) == list(range(16, 32, 2))
    assert candidate_layers("low", 30, True) == list(range(2, 15, 2))
    assert candidate_layers("low", 80, False) == list(range(0, 20, 2))
    assert candidate_layers("high", 80, False) == list(range(60, 80, 2))
    assert candidate_layers("low", 4, True) == [2]
    assert candidate_layers("6,2+4,2", 8, False) == [2, 4, 6]
    with pytest.raises(ValueError, match="name layers"):
        candidate_layers("low", 3, True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--dola-layers", "2,30"), "layer 30 is not before the last; the model has 30 layers"),
        (("--dola-layers", "some"), "dola_layers 'some': low, high, or numbers"),
        (("--dola-relative-top", "2"), "dola_relative_top 2.0: must lie between 0 and 1"),
        (("--engine-arg", 'additional_config={"a": 1}'), "additional_config: strategy dola does not work with it"),
    ],
)
def test_what_cannot_be_is_said_in_one_line_before_anything_is_loaded(smollm2, tmp_path, capsys, options, words):
    arguments = ("--model", str(smollm2), "--output", str(tmp_path / "out"), "--strategy", "dola", *options)
    assert words in fails(capsys, 2, "decode", str(DEMO_ROWS), *arguments)


def test_a_model_without_such_a_class_is_refused_by_name(tiny_models):
    info = ModelInfo(str(tiny_models["gemma3"]), None, False, frozenset(), None, 512, 96, 3, 4)
    with pytest.raises(ValueError, match="Gemma3ForCausalLM has no class with early exits; it runs Llama"):
        engine_args(info, "low", 0.1, {})
