"""Runs that were interrupted before strategies had options of their own are resumed, and what may differ then.

`tests/interrupted_runs` holds one run of each strategy, killed at commit bf5e533 after its first part, on `rows.jsonl`
and a tiny model named `tiny` (tests/tiny_smollm2.py).
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import CHECKOUT
from safetensors.torch import load_file, save_file

from agd_vllm import Decoder
from agd_vllm.models.digest import model_digest
from agd_vllm.output.run_reader import RunReader
from agd_vllm.output.summary import OutputUnusable, open_run
from agd_vllm.pipeline.run import RunSettings, run_identity

RECORDED = CHECKOUT / "tests/interrupted_runs"
OPTIONS = {
    "greedy": {},
    "agd": {"tau": 0.5, "top_k": 4},
    "agd-inline": {"scorer": "inline", "tau": 0.5},
    "agd-lxt": {"scorer": "lxt", "rule": "cplrp"},
    "cad": {"cad_alpha": 0.7},
    "dola": {"dola_layers": "high"},
    "steer": {"steering": "vectors.safetensors", "steering_strength": 2.0},
    "emphasize": {},
    "random-candidate": {"seed": 7},
}
ENGINE_ARGS = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 27, "max_num_seqs": 2}
COMMON = {"dtype": "float32", "max_tokens": 64, "max_model_len": 256}
LESS_MEMORY = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 26, "max_num_seqs": 1, "block_size": 32}


@pytest.fixture
def here(tiny_smollm2, tmp_path, monkeypatch) -> Path:
    """A folder with the model, the rows and the vectors of the recorded runs, in which commands are given."""
    shutil.copytree(tiny_smollm2, tmp_path / "tiny")
    for name in ("rows.jsonl", "vectors.safetensors"):
        shutil.copy(RECORDED / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def strategy_of(name: str) -> str:
    return name if name == "random-candidate" else name.partition("-")[0]


def claim(output: str | Path, model: str = "tiny", **options) -> None:
    """As a run of the rows does, before it loads anything."""
    given = {"strategy": "greedy", "engine_args": ENGINE_ARGS, **COMMON, **options}
    identity = run_identity(RunSettings(("rows.jsonl",), str(output)), Decoder(model, **given))
    open_run(str(output), identity, resume=True)


def refused(output: str | Path, **options) -> str:
    with pytest.raises(OutputUnusable, match="holds a different run") as error:
        claim(output, **options)
    return str(error.value)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_recorded_run_is_the_same_run_with_any_memory(here, name):
    shutil.copytree(RECORDED / name, here / "out")
    given = {"strategy": strategy_of(name), **OPTIONS[name]}
    claim("out", **given)
    claim("out", **given, engine_args=LESS_MEMORY)
    assert "max_tokens is 64 there and 65 here" in refused("out", **given, max_tokens=65)
    assert "engine_args.max_logprobs is null there" in refused("out", **given, engine_args={"max_logprobs": 5})
    other = {"greedy": "emphasize"}.get(given["strategy"], "greedy")
    assert f'strategy is "{given["strategy"]}" there' in refused("out", strategy=other)
    assert RunReader("out").parameters()["strategy"] == given["strategy"]


@pytest.mark.parametrize(
    ("name", "option", "value", "there"),
    [
        ("agd", "tau", 0.6, "tau is 0.5 there and 0.6 here"),
        ("agd", "scorer", "inline", 'scorer is "forward" there'),
        ("agd-lxt", "rule", "ixg", 'rule is "cplrp" there'),
        ("cad", "cad_alpha", 0.5, "cad_alpha is 0.7 there"),
        ("cad", "repetition_penalty", 1.2, "repetition_penalty is 1.0 there"),
        ("dola", "dola_layers", "low", 'dola_layers is "high" there'),
        ("steer", "steering_strength", 1.0, "steering_strength is 2.0 there"),
        ("random-candidate", "seed", 0, "seed is 7 there"),
        ("greedy", "entropies", True, "entropies is false there"),
    ],
)
def test_an_option_of_the_runs_strategy_decides(here, name, option, value, there):
    shutil.copytree(RECORDED / name, here / "out")
    given = {"strategy": strategy_of(name), **OPTIONS[name], option: value}
    assert there in refused("out", **given)


# The thirteen that a run may be resumed with otherwise.
PLACE_AND_MEMORY = [
    {"engines": 2},
    {"attribution_workers": 3},
    {"log_json": "faults.jsonl"},
    {"trace": "trace.json"},
    {"debug": True},
    {"model": "moved/tiny-of-another-name"},
    *(
        {"engine_args": ENGINE_ARGS | {name: value}}
        for name, value in (
            ("gpu_memory_utilization", 0.5),
            ("kv_cache_memory_bytes", 1 << 25),
            ("max_num_seqs", 64),
            ("max_num_batched_tokens", 4096),
            ("enforce_eager", False),
            ("block_size", 64),
            ("tensor_parallel_size", 2),
        )
    ),
]


@pytest.mark.parametrize("otherwise", PLACE_AND_MEMORY, ids=lambda otherwise: str(otherwise)[:60])
@pytest.mark.parametrize("strategy", ["greedy", "agd"])
def test_memory_and_place_are_no_part_of_a_run(here, strategy, otherwise):
    claim("out", strategy=strategy)
    if "model" in otherwise:
        (here / "moved").mkdir()
        (here / "tiny").rename(here / otherwise["model"])
    claim("out", **{"strategy": strategy, **otherwise})


def test_a_run_without_a_digest_is_known_by_the_models_name(here):
    shutil.copytree(RECORDED / "greedy", here / "out")
    (here / "tiny").rename(here / "moved")
    assert 'model is "tiny" there and "moved" here' in refused("out", model="moved")


def test_models_that_differ_in_their_last_layer_only_are_two_runs(here):
    claim("out")
    (here / "tiny").rename(here / "before")
    shutil.copytree(here / "before", here / "tiny")
    config = json.loads((here / "tiny/config.json").read_text())
    (here / "tiny/config.json").write_text(json.dumps(config | {"_name_or_path": "elsewhere"}, indent=8))
    claim("out")
    weights = load_file("tiny/model.safetensors")
    for name in weights:
        if ".layers.3." in name:
            weights[name] = weights[name] + 0.01
    save_file(weights, "tiny/model.safetensors", {"format": "pt"})
    assert "the weights or the config.json of tiny there are not those of tiny here" in refused("out")
    shutil.copytree(here / "before", here / "tiny", dirs_exist_ok=True)
    (here / "tiny/config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))
    assert "the weights or the config.json" in refused("out")


def test_a_digest_reads_pieces_of_every_weight_file(tmp_path):
    """A change of any of the 16 places, in any file, is seen."""
    (tmp_path / "config.json").write_text("{}")
    files = [tmp_path / f"model-{number}.safetensors" for number in range(2)]
    for file in files:
        file.write_bytes(bytes(4 << 20))
    first = model_digest(str(tmp_path), None)
    for file in files:
        for piece in range(16):
            data = bytearray(4 << 20)
            data[((4 << 20) - (64 << 10)) * piece // 15] = 1
            file.write_bytes(data)
            assert model_digest(str(tmp_path), None) != first, (file.name, piece)
        file.write_bytes(bytes(4 << 20))
    assert model_digest(str(tmp_path), None) == first
    files[0].write_bytes(bytes((4 << 20) + 1))
    assert model_digest(str(tmp_path), None) != first


@pytest.mark.long
@pytest.mark.parametrize("name", ["agd", "steer"])
def test_a_recorded_run_is_resumed_to_its_end(here, name):
    """By the command; what it had is kept."""
    shutil.copytree(RECORDED / name, here / "out")
    before = pq.read_table(here / "out/results").to_pylist()
    command = [sys.executable, "-m", "agd_vllm", "decode", "rows.jsonl", "--model", "tiny", "--output", "out"]
    command += ["--strategy", strategy_of(name), "--part-rows", "2"]
    for option, value in (COMMON | OPTIONS[name]).items():
        command += [f"--{option.replace('_', '-')}", str(value)]
    for option, value in LESS_MEMORY.items():
        command += ["--engine-arg", f"{option}={json.dumps(value)}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["id"]: row for row in pq.read_table(here / "out/results").to_pylist()}
    assert sorted(rows) == [f"{number}" for number in range(6)]
    assert all(rows[row["id"]] == row for row in before)
    summary = json.loads((here / "out/summary.json").read_text())
    assert (summary["decoded"], summary["failed"], summary["engine_args"]) == (6, 0, LESS_MEMORY)
    assert ("scorer" in summary, "attribution_workers" in summary) == (name == "agd", name == "agd")
