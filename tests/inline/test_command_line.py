"""`--scorer inline` as users run it: the command line, a script of their own, a machine without a compiler.

Kills: pipeline/test_chaos.py."""

import json
import os
import re
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from conftest import CHECKOUT, DEMO_ROWS, RUNNER_V2, python_path

# A region of its own for the same prompt, last: cached blocks of the one must not serve the other.
ROLES = ("system", "user")
GUIDED = ("candidate_ids", "chosen_id", "greedy_id")


def run(rows, model, output, *options, **environment):
    command = [sys.executable, "-m", "agd_vllm", "decode", str(rows), "--model", str(model), "--output", str(output)]
    command += ["--dtype", "float32", "--max-model-len", "1024", "--engine-arg", "enforce_eager=true", *options]
    if not any("kv_cache_memory_bytes" in option for option in options):
        command += ["--engine-arg", "kv_cache_memory_bytes=536870912"]
    return subprocess.run(
        command, cwd=CHECKOUT, env=os.environ | environment, capture_output=True, text=True, timeout=580
    )


def decoded(output):
    rows = {row["id"]: row for row in pq.read_table(output / "results").to_pylist()}
    steps = {(step["id"], step["step"]): step for step in pq.read_table(output / "steps").to_pylist()}
    return rows, steps


def conversations(count):
    rows = [row for row in map(json.loads, DEMO_ROWS.read_text().splitlines()) if "messages" in row][:count]
    return [
        row | {"id": f"{row['id']}-{role}", "roi": [{"role": role}], "max_tokens": 20} for role in ROLES for row in rows
    ]


@pytest.fixture(scope="module")
def inline(smollm2, tmp_path_factory):
    """Six conversations under two regions each, decoded by the command line."""
    folder = tmp_path_factory.mktemp("inline")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations(6)))
    done = run(folder / "rows.jsonl", smollm2, folder / "out", "--scorer", "inline", "--tau", "0.7")
    assert done.returncode == 0, done.stderr
    return folder, done


def test_the_header_says_which_scorer_runs_and_no_worker_does(inline):
    folder, done = inline
    assert "1 engine" in done.stderr and "scorer inline" in done.stderr
    assert "attribution worker" not in done.stderr
    summary = json.loads((folder / "out/summary.json").read_text())
    assert (summary["scorer"], summary["attribution_workers"], summary["failed"]) == ("inline", 0, 0)
    rows, steps = decoded(folder / "out")
    assert summary["guided_steps"] == len(steps) == sum(row["num_guided"] for row in rows.values()) > 60


@pytest.mark.parametrize(
    ("count", "runner"), [(6, {}), pytest.param(2, RUNNER_V2, marks=pytest.mark.long)], ids=["v1", "v2"]
)
def test_a_script_of_ones_own_gives_the_command_lines_tokens_and_steps(inline, smollm2, tmp_path, count, runner):
    """Two regions over the same prompts, in one batch, with the prefix cache on and no salts."""
    folder, _ = inline
    rows, steps = decoded(folder / "out")
    asked = conversations(count)
    job = {"model": str(smollm2), "rows": asked, "output": str(tmp_path / "tokens.json")}
    command = [sys.executable, str(CHECKOUT / "tests/inline/script.py")]
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": python_path(CHECKOUT)} | runner
    done = subprocess.run(command, input=json.dumps(job), env=environment, text=True, capture_output=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads((tmp_path / "tokens.json").read_text())
    for row, (token_ids, text, guided) in zip(asked, answers, strict=True):
        assert token_ids == rows[row["id"]]["token_ids"]
        assert text == rows[row["id"]]["text"]
        theirs = [steps[key] for key in sorted(steps) if key[0] == row["id"]]
        assert [[step, chosen] for step, chosen, _ in guided] == [[step["step"], step["chosen_id"]] for step in theirs]
        for (*_, scores), step in zip(guided, theirs, strict=True):
            assert scores == pytest.approx(step["scores"], abs=1e-4 * max(map(abs, step["scores"])))
    assert sum(len(guided) for *_, guided in answers) > 10
    halves = answers[:count], answers[count:]
    assert any(one[0] != other[0] for one, other in zip(*halves, strict=True)), "the regions make no difference"


@pytest.mark.long
def test_the_script_of_the_documentation_runs_as_it_stands(smollm2, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (CHECKOUT / "docs/inline.md").read_text(), re.DOTALL)
    (tmp_path / "script.py").write_text(code.replace("path/or/hub-id", str(smollm2)))
    # It takes half of the memory, which other tests use at the same time: vLLM's own variable gives it one GiB.
    environment = {"VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": python_path(CHECKOUT), "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, env=os.environ | environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    *_, last = done.stdout.splitlines()
    # A guided step: its number and entropy, candidates, scores, the chosen token.
    assert re.fullmatch(r"\d+ \S+ \[.*\] \[.*\] \d+", last), done.stdout


@pytest.mark.long
def test_with_the_model_runner_of_gpus_it_decodes_the_same(inline, smollm2, tmp_path):
    """Model Runner V2, its kernels interpreted, the engine in processes of its own, scheduling asynchronous."""
    folder, _ = inline
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row | {"max_tokens": 8}) + "\n" for row in conversations(6)[4:8])
    )
    options = ("--scorer", "inline", "--tau", "0.7")
    done = run(tmp_path / "rows.jsonl", smollm2, tmp_path / "out", *options, **RUNNER_V2)
    assert done.returncode == 0, done.stderr
    (expected, steps), (rows, its_steps) = decoded(folder / "out"), decoded(tmp_path / "out")
    assert len(rows) == 4 and len(its_steps) > 8
    for name, row in rows.items():
        assert row["token_ids"] == expected[name]["token_ids"][:8]
    assert its_steps.keys() == {key for key in steps if key[0] in rows and key[1] < 8}
    for key, step in its_steps.items():
        assert [step[name] for name in GUIDED] == [steps[key][name] for name in GUIDED]
        largest = max(map(abs, step["scores"]))
        assert step["scores"] == pytest.approx(steps[key]["scores"], abs=1e-4 * largest)


@pytest.mark.long
def test_without_a_compiler_it_decodes_the_same_and_says_so_once(inline, smollm2, tmp_path):
    """In parts: test_models.py for the scores, tests/kernels/test_compiled_kernels.py for what is said."""
    folder, _ = inline
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations(6)[:2]))
    options = ("--scorer", "inline", "--tau", "0.7", "--debug")
    done = run(tmp_path / "rows.jsonl", smollm2, tmp_path / "out", *options, CC="false", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("slower without a C compiler") == 1
    expected, steps = decoded(folder / "out")
    rows, its_steps = decoded(tmp_path / "out")
    for name, row in rows.items():
        assert row["token_ids"] == expected[name]["token_ids"]
    assert all(step["chosen_id"] == steps[key]["chosen_id"] for key, step in its_steps.items())


def test_a_cache_that_cannot_hold_a_row_is_told_in_one_line(smollm2, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(conversations(1)[0]) + "\n")
    options = ("--scorer", "inline", "--engine-arg", "kv_cache_memory_bytes=33554432")
    done = run(tmp_path / "rows.jsonl", smollm2, tmp_path / "out", *options)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("agd-vllm: ")]
    assert "--max-model-len 1024 takes 0.09 GiB" in line and "there are 0.03 GiB" in line


@pytest.mark.long
def test_the_demo_is_that_of_the_workers(smollm2, tmp_path):
    for scorer in ("forward", "inline"):
        done = run(DEMO_ROWS, smollm2, tmp_path / scorer, "--scorer", scorer, "--tau", "0", "--max-tokens", "48")
        assert done.returncode == 0, done.stderr
    (ours, our_steps), (theirs, their_steps) = decoded(tmp_path / "inline"), decoded(tmp_path / "forward")
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name, row in theirs.items():
        assert ours[name] == row
    assert our_steps.keys() == their_steps.keys()
    for key, step in their_steps.items():
        for name in GUIDED:
            assert our_steps[key][name] == step[name]
        largest = max(map(abs, step["scores"]))
        assert our_steps[key]["scores"] == pytest.approx(step["scores"], abs=1e-4 * largest)
