"""The command line: faults of a whole run stop it before a model is loaded; faults of a row cost that row only."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from command_line import fails, run
from conftest import CHECKOUT, DEMO_ROWS

from agd_vllm import Decoder
from agd_vllm.output.summary import open_run
from agd_vllm.pipeline.run import RunSettings, run_identity

GOOD = {"id": "good", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n")
    return str(path)


def test_unusable_inputs(capsys, tmp_path, smollm2, data):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    common = ("--model", str(smollm2), "--output", str(tmp_path / "out"))
    assert "missing.jsonl" in fails(capsys, 2, "decode", str(tmp_path / "missing.jsonl"), *common)
    assert "director" in fails(capsys, 2, "decode", str(tmp_path), *common)
    assert "empty" in fails(capsys, 2, "decode", str(empty), *common)
    # One unusable input among good ones stops the run, too, before anything is written.
    assert "empty" in fails(capsys, 2, "decode", data, str(empty), *common)
    assert not (tmp_path / "out").exists()


def test_unusable_models(capsys, tmp_path, smollm2, data):
    output = ("--output", str(tmp_path / "out"))
    assert "no such folder" in fails(capsys, 2, "decode", data, "--model", str(tmp_path / "nowhere"), *output)

    (tmp_path / "bare").mkdir()
    assert "configuration" in fails(capsys, 2, "decode", data, "--model", str(tmp_path / "bare"), *output)

    other = shutil.copytree(smollm2, tmp_path / "other", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps({**config, "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"})
    )
    line = fails(capsys, 2, "decode", data, "--model", str(other), *output)
    assert "GPT2LMHeadModel" in line
    for supported in ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM"):
        assert supported in line
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_an_unused_special_token_cannot_pause(capsys, tmp_path, smollm2, data):
    model = shutil.copytree(smollm2, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = tokenizer["added_tokens"][:3]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    line = fails(capsys, 2, "decode", data, "--model", str(model), "--output", str(tmp_path / "out"))
    assert "no unused special token" in line
    # Greedy decoding pauses nowhere: the same model is fine.
    assert run(capsys, "decode", data, "--model", str(model), "--strategy", "greedy", "--dry-run")[0] == 0


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("--tau", "-1", "tau"),
        ("--tau", "nan", "tau"),
        ("--top-k", "1", "top_k"),
        ("--min-prob", "1.5", "min_prob"),
        ("--max-tokens", "0", "max_tokens"),
        ("--max-model-len", "8193", "8192"),
        ("--engines", "0", "engines"),
        ("--attribution-workers", "0", "attribution_workers"),
        ("--limit", "0", "limit"),
        ("--part-rows", "0", "part-rows"),
        ("--strategy", "sampling", "strategy"),
        ("--roi", "role=nobody", "roi"),
        ("--engine-arg", "novalue", "KEY=VALUE"),
        ("--engine-arg", "no_such_argument=1", "no_such_argument"),
        ("--engine-arg", "dtype=float16", "dtype"),
        ("--chat-template-kwargs", "[1]", "JSON object"),
        ("--chat-template-kwargs", "{", "JSON"),
    ],
)
def test_unusable_options(capsys, tmp_path, smollm2, data, option, value, word):
    arguments = ("--model", str(smollm2), "--output", str(tmp_path / "out"), option, value)
    assert word in fails(capsys, 2, "decode", data, *arguments)
    assert not (tmp_path / "out").exists()


def test_the_output_is_needed_and_must_not_hold_something_else(capsys, tmp_path, smollm2, data):
    assert "--output" in fails(capsys, 2, "decode", data, "--model", str(smollm2))
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    assert "not empty" in fails(capsys, 2, "decode", data, "--model", str(smollm2), "--output", str(other))
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]


def test_dry_run_shows_the_region_and_loads_no_model(capsys, smollm2, tmp_path):
    bare = shutil.copytree(smollm2, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    status, out, _ = run(capsys, "decode", str(DEMO_ROWS), "--model", str(bare), "--dry-run")
    assert status == 0
    assert "⟦" in out
    assert "26" in out


def test_dry_run_reports_bad_rows(capsys, smollm2, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps({"id": "no-region", "prompt": "Hi"}) + "\n")
    status, out, _ = run(capsys, "decode", str(path), "--model", str(smollm2), "--dry-run")
    assert status == 3
    assert "no-region" in out or "line 2" in out


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "No such file"),
        ("{", "no head set"),
        ('{"heads": [3]}', "no head set"),
        ('{"heads": []}', "empty"),
        ('{"heads": [[30, 0]]}', "layers 0 to 29"),
        ('{"heads": [[0, 9]]}', "heads 0 to 8"),
        ('{"heads": [[0, -1]]}', "heads 0 to 8"),
    ],
)
def test_unusable_head_sets(capsys, tmp_path, smollm2, data, content, word):
    path = tmp_path / "heads.json"
    if content is not None:
        path.write_text(content)
    arguments = ("--model", str(smollm2), "--output", str(tmp_path / "out"), "--roi-heads", str(path))
    assert word in fails(capsys, 2, "decode", data, *arguments)


def test_code_of_a_model_is_not_run_unless_asked_for(capsys, tmp_path, smollm2, data):
    model = shutil.copytree(smollm2, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((model / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (model / "config.json").write_text(json.dumps(config | own))
    (model / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Config: pass\n")
    fails(capsys, 2, "decode", data, "--model", str(model), "--output", str(tmp_path / "out"))
    assert not (tmp_path / "run").exists()


def test_a_changed_input_is_another_run(capsys, tmp_path, smollm2, data):
    arguments = ("decode", data, "--model", str(smollm2), "--output", str(tmp_path / "out"))
    identity = run_identity(RunSettings((data,), str(tmp_path / "out")), Decoder(str(smollm2)))
    open_run(str(tmp_path / "out"), identity, resume=True)
    Path(data).write_text(json.dumps(GOOD | {"id": "other"}) + "\n")
    assert "inputs" in fails(capsys, 2, *arguments)


def test_unknown_demo_model(capsys, tmp_path):
    assert "smollm2-135m-instruct" in fails(capsys, 2, "model", "fetch", "gpt-5", "--output", str(tmp_path / "m"))


ROI = [{"message": 0}]
BAD = {
    "malformed": '{"id": "x", ',
    "not an object": "[1, 2]",
    "no id": json.dumps({"prompt": "Hi"}),
    "duplicate id": json.dumps(GOOD),
    "both": json.dumps({**GOOD, "id": "both", "prompt": "Hi"}),
    "neither": json.dumps({"id": "neither"}),
    "unknown role": json.dumps({"id": "role", "messages": [{"role": "wizard", "content": "Hi"}]}),
    "no messages": json.dumps({"id": "empty", "messages": []}),
    "no match": json.dumps({**GOOD, "id": "match", "roi": [{"message": 0, "text": "French"}]}),
    "out of range": json.dumps({**GOOD, "id": "range", "roi": [{"message": 7}]}),
    "unknown key": json.dumps({**GOOD, "id": "key", "roi": [{"massage": 0}]}),
    "no region": json.dumps({"id": "region", "messages": [{"role": "user", "content": "Hi"}]}),
    "temperature": json.dumps({**GOOD, "id": "temperature", "temperature": 0.7}),
    "n": json.dumps({**GOOD, "id": "n", "n": 2}),
    "penalty": json.dumps({**GOOD, "id": "penalty", "frequency_penalty": 0.5}),
    "tools": json.dumps({**GOOD, "id": "tools", "tools": [{"type": "function"}]}),
    "list content": json.dumps({"id": "list", "messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    "longer than the model": json.dumps({"id": "long", "prompt": "word " * 900, "roi": [{"chars": [0, 4]}]}),
}


def check_trace(path: Path, guided: int) -> None:
    """Chrome's trace format without its closing bracket: engine steps, and every guided step in one scored batch."""
    events = json.loads(path.read_text().rstrip().rstrip(",") + "]")
    names = {(event["pid"], event["tid"]): event["args"]["name"] for event in events if event["name"] == "thread_name"}
    spans = [event for event in events if event["ph"] == "X"]
    assert all(event["ts"] > 0 and event["dur"] >= 0 for event in spans)
    steps = [event for event in spans if names[event["pid"], event["tid"]] == "vLLM"]
    assert len(steps) > 24
    assert max(event["args"]["rows"] for event in steps) <= 8
    # The first prompts reach the worker while vLLM computes them, too.
    assert any(event["name"] == "prefill" for event in spans)
    for track in ("calls to worker 0", "worker 0"):
        scored = [event["args"]["steps"] for event in spans if names[event["pid"], event["tid"]] == track]
        assert sum(scored) == guided


def test_bad_rows_are_reported_and_the_rest_is_decoded(smollm2, tmp_path):
    """One run over every kind of bad row, in a cache of 19 blocks of 32 tokens, then resumed with nothing to do."""
    lines = [
        json.dumps(GOOD).encode(),
        b"",
        *(text.encode() for text in BAD.values()),
        b'{"id": "utf8", "prompt": "\xff"}',
    ]
    lines += [json.dumps({**GOOD, "id": f"good-{i}"}).encode() for i in range(24)]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    command = [sys.executable, "-m", "agd_vllm", "decode", str(tmp_path / "rows.jsonl"), "--model", str(smollm2)]
    command += ["--output", str(tmp_path / "out"), "--max-tokens", "24", "--max-model-len", "608", "--tau", "0.5"]
    for arg in ("enforce_eager=true", "block_size=32", "num_gpu_blocks_override=20", "max_num_seqs=8"):
        command += ["--engine-arg", arg]
    command += ["--trace", str(tmp_path / "trace.json")]
    for invocation in range(2):
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=500)
        assert done.returncode == 3, done.stderr
        assert "Traceback" not in done.stderr
        if invocation == 0:
            check_trace(tmp_path / "trace.json", pq.read_table(tmp_path / "out/steps").num_rows)
        assert ("nothing left to decode" in done.stderr) == (invocation == 1)
        assert ("1 engine on " in done.stderr and "1 attribution worker on " in done.stderr) == (invocation == 0)
        results = pq.read_table(tmp_path / "out/results").to_pylist()
        assert {row["id"] for row in results} == {"good", *(f"good-{i}" for i in range(24))}
        errors = [json.loads(line) for line in (tmp_path / "out/errors.jsonl").read_text().splitlines()]
        assert [error["line"] for error in sorted(errors, key=lambda e: e["line"])] == list(range(3, 4 + len(BAD)))
        by_line = {error["line"]: error for error in errors}
        for line, (kind, text) in enumerate(BAD.items(), start=3):
            error = by_line[line]
            assert error["error"]["message"].strip(), kind
            assert error["file"] == str(tmp_path / "rows.jsonl")
            assert "\n" not in error["error"]["message"]
            assert error["input"] == (json.loads(text) if kind != "malformed" else text)
        summary = json.loads((tmp_path / "out/summary.json").read_text())
        assert (summary["rows"], summary["decoded"], summary["failed"]) == (26 + len(BAD), 25, 1 + len(BAD))
        assert summary["guided_steps"] == pq.read_table(tmp_path / "out/steps").num_rows > 0

    different = subprocess.run([*command, "--tau", "0.7"], cwd=CHECKOUT, capture_output=True, text=True, timeout=500)
    assert different.returncode == 2
    assert "tau" in different.stderr
