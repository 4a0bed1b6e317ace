"""`agd-vllm decode` in float32, by both thresholds, against the paper's loop, step by step
(tests/paper_loop.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import CHECKOUT
from real_runs import DEFAULT_TAU, PROMPTS, TOKENS, engine_options

# The literal loop runs k backward passes at every gate.
pytestmark = pytest.mark.timeout(1500)

ROWS = len(PROMPTS)
TIE = 1e-4
TAUS = (0.0, DEFAULT_TAU)


@pytest.fixture(scope="module")
def runs(command_run, guided_run):
    """Output folders by threshold."""
    return {0.0: guided_run.output, DEFAULT_TAU: command_run.output}


def start_loop(model: Path, rows: list[dict], output: Path) -> tuple[subprocess.Popen, Path]:
    job = output.with_suffix(".job")
    job.write_text(json.dumps({"model": str(model), "rows": rows, "top_k": 5, "min_prob": 0.05, "output": str(output)}))
    command = [sys.executable, str(CHECKOUT / "tests/paper_loop.py")]
    with job.open() as stdin:
        return subprocess.Popen(command, stdin=stdin), output


HALVES = {"first": range(ROWS // 2), "second": range(ROWS // 2, ROWS)}


@pytest.fixture(scope="module", params=["first", pytest.param("second", marks=pytest.mark.long)])
def compared(request, runs, smollm2, tmp_path_factory):
    """Each row of a half, of both runs, with our steps by index and the loop's view of each step."""
    rows, names = [], {f"short-{index}" for index in HALVES[request.param]}
    for tau, directory in runs.items():
        steps: dict[str, dict[int, dict]] = {}
        for step in pq.read_table(directory / "steps").to_pylist():
            steps.setdefault(step["id"], {})[step["step"]] = step
        for row in pq.read_table(directory / "results").to_pylist():
            if row["id"] not in names:
                continue
            spans = [(span["start"], span["end"], span["weight"]) for span in row["roi_spans"]]
            kept = {key: row[key] for key in ("id", "prompt_token_ids", "token_ids")}
            rows.append(kept | {"tau": tau, "spans": spans, "steps": steps.get(row["id"], {})})
    # A core each: two processes of one thread are half as fast again as one of two.
    processes = min(2, len(os.sched_getaffinity(0)))
    folder, parts = tmp_path_factory.mktemp("loop"), [rows[index::processes] for index in range(processes)]
    loops = [start_loop(smollm2, part, folder / f"{index}.json") for index, part in enumerate(parts)]
    for part, (loop, output) in zip(parts, loops, strict=True):
        assert loop.wait() == 0
        for row, looped in zip(part, json.loads(output.read_text()), strict=True):
            row["loop"] = looped["loop"]
    return rows


def on_the_edge(theirs: dict, tau: float) -> bool:
    """Whether the gate or the candidate set may fall on either side: entropy against tau, probability against pi_min
    or against the next one at the end of the top k."""
    probs = theirs["top_probs"]
    return (
        abs(theirs["entropy"] - tau) < TIE or min(abs(p - 0.05) for p in probs) < TIE or abs(probs[4] - probs[5]) < TIE
    )


def is_tie(theirs: dict, ours: dict | None, tau: float) -> bool:
    if on_the_edge(theirs, tau):
        return True
    if theirs["gated"]:
        first, second = sorted(theirs["scores"])[-1:-3:-1]
        return first - second < TIE
    return ours is None and theirs["logit_gap"] < TIE


def test_tokens_are_those_of_the_papers_loop(compared):
    assert len(compared) == ROWS // 2 * len(TAUS)
    assert sum(len(row["token_ids"]) for row in compared) > ROWS // 2 * TOKENS
    parted = []
    for row in compared:
        for index, (token, theirs) in enumerate(zip(row["token_ids"], row["loop"], strict=True)):
            if token != theirs["choice"]:
                assert is_tie(theirs, row["steps"].get(index), row["tau"]), (row["id"], row["tau"], index, theirs)
                parted.append((row["id"], row["tau"], index))
    print(f"{len(parted)} ties fell the other way: {parted}")
    assert len(parted) <= 1


def test_gates_open_where_the_loops_do_and_scores_agree(compared):
    guided = 0
    for row in compared:
        for index, theirs in enumerate(row["loop"]):
            ours = row["steps"].get(index)
            if on_the_edge(theirs, row["tau"]):
                continue
            assert (ours is not None) == theirs["gated"], (row["id"], row["tau"], index)
            if ours is None:
                continue
            guided += 1
            assert ours["entropy"] == pytest.approx(theirs["entropy"], abs=TIE)
            scores = dict(zip(ours["candidate_ids"], ours["scores"], strict=True))
            expected = dict(zip(theirs["candidates"], theirs["scores"], strict=True))
            assert scores.keys() == expected.keys()
            bound = 1e-3 * max(map(abs, expected.values()))
            for candidate, score in expected.items():
                assert scores[candidate] == pytest.approx(score, abs=bound)
    assert guided > 30


def test_guided_steps_are_consistent(compared):
    for row in compared:
        for index, step in row["steps"].items():
            assert step["chosen_id"] == step["candidate_ids"][step["scores"].index(max(step["scores"]))]
            assert step["greedy_id"] == step["candidate_ids"][0]
            assert row["token_ids"][index] == step["chosen_id"]
            assert 2 <= len(step["candidate_ids"]) <= 5
            assert min(step["candidate_probs"]) >= 0.05 - 1e-7
            assert step["entropy"] >= row["tau"] - 1e-6


@pytest.mark.long
def test_the_reference_scorer_decodes_the_same(command_run, guided_run, smollm2, tmp_path):
    """`--scorer lxt` against the default, forward mode, on some of the rows."""
    command = [sys.executable, "-m", "agd_vllm", "decode", str(guided_run.data), "--output", str(tmp_path / "lxt")]
    command += ["--model", str(smollm2), "--dtype", "float32", "--scorer", "lxt", "--limit", "2", *engine_options()]
    subprocess.run(command, check=True, timeout=560, cwd=CHECKOUT)
    ours = {row["id"]: row["token_ids"] for row in pq.read_table(command_run.output / "results").to_pylist()}
    reference = {row["id"]: row["token_ids"] for row in pq.read_table(tmp_path / "lxt" / "results").to_pylist()}
    assert len(reference) == 2
    assert reference == {name: ours[name] for name in reference}
    of_command = pq.read_table(command_run.output / "steps").to_pylist()
    forward = {(step["id"], step["step"]): step["scores"] for step in of_command}
    steps = pq.read_table(tmp_path / "lxt" / "steps").to_pylist()
    assert steps
    for step in steps:
        bound = 1e-4 * max(map(abs, step["scores"]))
        assert forward[step["id"], step["step"]] == pytest.approx(step["scores"], abs=bound)
