"""The command line: faults of a whole run stop it before a model is loaded; faults of a row cost that row only."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from chaos import demo_rows
from command_line import fails, run
from conftest import CHECKOUT, DEMO_ROWS
from real_runs import BAD, GOOD, short_rows

from agd_vllm import Decoder
from agd_vllm.output.summary import open_run
from agd_vllm.pipeline.run import RunSettings, run_identity


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
        ("--engine-arg", "data_parallel_size=2", "use --engines"),
        ("--chat-template-kwargs", "[1]", "JSON object"),
        ("--chat-template-kwargs", "{", "JSON"),
        ("--chat-template-kwargs", '{"a": {"date": 1, "date": 2}}', "date is named twice"),
        ("--engine-arg", 'hf_overrides={"a": 1, "a": 1}', "hf_overrides: a is named twice"),
    ],
)
def test_unusable_options(capsys, tmp_path, smollm2, data, option, value, word):
    arguments = ("--model", str(smollm2), "--output", str(tmp_path / "out"), option, value)
    assert word in fails(capsys, 2, "decode", data, *arguments)
    assert not (tmp_path / "out").exists()


def test_an_engine_argument_is_named_once(capsys, smollm2, data):
    twice = ("--engine-arg", "block_size=16", "--engine-arg", "seed=1", "--engine-arg", "block_size=32")
    line = fails(capsys, 2, "decode", data, "--model", str(smollm2), "--dry-run", *twice)
    assert "block_size is named twice" in line


@pytest.mark.parametrize(
    ("arguments", "twice"),
    [
        (["--model_args", "pretrained=m,tau=0,tau=1"], "--model_args: tau is"),
        (["-a", "pretrained=m", "tau=0", "--tasks", "t", "--model_args=tau=1"], "--model_args: tau is"),
        (["--model_args", '{"pretrained": "m", "engine_args": {"seed": 0, "seed": 1}}'], "--model_args: seed is"),
        (["--model_args", '{"tau": 0}', "tau=1"], "--model_args: tau is"),
        (["--gen_kwargs", "until=['a,until=b', 'c'],until=d"], "--gen_kwargs: until is"),
        (["--gen_kwargs", "until=['tau=1,tau=2'],metadata={'a':['b=1','b=2,b=3']},until_x=d"], None),
        (["--gen_kwargs", "do_sample=False", "--tasks", "a=1,a=2"], None),
    ],
)
def test_an_argument_of_lm_eval_is_named_once(capsys, monkeypatch, arguments, twice):
    pytest.importorskip("lm_eval")
    started = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: started.append(True))
    monkeypatch.setattr(sys, "argv", ["agd-vllm"])
    if twice is None:
        assert run(capsys, "lm-eval", "run", "--model", "agd-vllm", *arguments)[0] == 0
    else:
        assert f"{twice} named twice" in fails(capsys, 2, "lm-eval", "run", "--model", "agd-vllm", *arguments)
    assert bool(started) == (twice is None)


def test_the_output_is_needed_and_must_not_hold_something_else(capsys, tmp_path, smollm2, data):
    assert "--output" in fails(capsys, 2, "decode", data, "--model", str(smollm2))
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    assert "not empty" in fails(capsys, 2, "decode", data, "--model", str(smollm2), "--output", str(other))
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]


STREAMS = (
    {"PYTHONIOENCODING": "latin-1:strict"},
    {"PYTHONIOENCODING": "ascii:strict"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"PYTHONIOENCODING": "utf-8:strict"},
)
PRINTS = r"""
import sys, click
from rich.console import Console
from agd_vllm.cli import cli, main
@cli.command()
def says():
    for stream in (sys.stdout, sys.stderr):
        print("\u2212 \u27e6 \udcff", file=stream)
        click.echo("\u2212 \u27e6", file=stream)
        Console(file=stream).print("\u2212 \u27e6")
    raise ValueError("\u2212 \u27e6")
main(["says"])
"""


@pytest.mark.parametrize("stream", STREAMS, ids=str)
def test_no_character_ends_a_command(stream):
    command = [sys.executable, "-c", PRINTS]
    done = subprocess.run(command, cwd=CHECKOUT, env=os.environ | stream, capture_output=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stdout.count(b"\n") == 3
    assert done.stderr.count(b"\n") == 4
    assert done.stderr.splitlines()[-1].startswith(b"agd-vllm: ")


def test_a_dry_run_on_a_terminal_of_another_encoding(smollm2):
    command = [sys.executable, "-m", "agd_vllm", "decode", str(DEMO_ROWS), "--model", str(smollm2), "--dry-run"]
    done = subprocess.run(command, cwd=CHECKOUT, env=os.environ | STREAMS[0], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"\\u27e6" in done.stdout


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


def test_bad_rows_are_reported_and_the_rest_is_decoded(capsys, command_run):
    """One run over every kind of bad row, in a cache of 19 blocks of 32 tokens, then resumed with nothing to do."""
    arguments, output = command_run.arguments, command_run.output
    for invocation in range(2):
        done = command_run.done
        status, err = done.returncode, done.stderr
        if invocation == 1:
            status, _, err = run(capsys, *arguments)
        assert status == 3, err
        assert "Traceback" not in err
        if invocation == 0:
            check_trace(output.parent / "trace.json", pq.read_table(output / "steps").num_rows)
        assert ("nothing left to decode" in err) == (invocation == 1)
        assert ("1 engine on " in err and "1 attribution worker on " in err) == (invocation == 0)
        results = pq.read_table(output / "results").to_pylist()
        good = {"good", *(row["id"] for row in (*short_rows(), *demo_rows(16)))}
        assert {row["id"] for row in results} == good
        errors = [json.loads(line) for line in (output / "errors.jsonl").read_text().splitlines()]
        assert [error["line"] for error in sorted(errors, key=lambda e: e["line"])] == list(range(3, 4 + len(BAD)))
        by_line = {error["line"]: error for error in errors}
        for line, (kind, text) in enumerate(BAD.items(), start=3):
            error = by_line[line]
            assert error["error"]["message"].strip(), kind
            assert error["file"] == str(command_run.data)
            assert "\n" not in error["error"]["message"]
            assert error["input"] == (json.loads(text) if kind != "malformed" else text)
        summary = json.loads((output / "summary.json").read_text())
        counts = (summary["rows"], summary["decoded"], summary["failed"])
        assert counts == (len(good) + 1 + len(BAD), len(good), 1 + len(BAD))
        assert summary["guided_steps"] == pq.read_table(output / "steps").num_rows > 0

    assert "tau" in fails(capsys, 2, *arguments, "--tau", "0.7")
