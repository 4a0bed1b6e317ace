"""Prefixes long enough that attention goes head by head and in several blocks of queries, against reverse mode."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from requests_for_tiny import as_request

from agd_vllm.attribution.forward import ForwardScorer

LENGTH = 420
MODELS = ("llama-3", "mistral", "qwen3", "gemma3")


def long_case(name: str) -> dict:
    """Regions at both ends, so that sliding windows see one of them."""
    rng = random.Random(name)
    return {
        "name": name,
        "token_ids": [rng.randrange(3, tiny.VOCABULARY) for _ in range(LENGTH)],
        "spans": [(0, 40, 1.0), (LENGTH - 12, LENGTH - 2, 0.5)],
        "heads": [(1, 2)],
        "candidate_ids": rng.sample(range(tiny.VOCABULARY), 12),
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return {name: tiny.save(name, folder) for name in MODELS}


@pytest.fixture(scope="module")
def oracle(models, tmp_path_factory) -> dict[str, list[float]]:
    output = tmp_path_factory.mktemp("oracle") / "scores.json"
    cases = {str(path): [long_case(name)] for name, path in models.items()}
    job = {"rule": "attnlrp", "output": str(output), "models": cases}
    command = [sys.executable, str(Path(__file__).parent / "oracle.py")]
    subprocess.run(command, input=json.dumps(job), text=True, check=True, timeout=500)
    scores = json.loads(output.read_text())
    return {name: scores[str(path)][0] for name, path in models.items()}


@pytest.mark.parametrize("name", MODELS)
def test_a_long_prefix_scores_as_reverse_mode_does(models, oracle, name):
    (scores,) = ForwardScorer(str(models[name])).score([as_request(long_case(name))])
    assert scores == pytest.approx(oracle[name], rel=0, abs=1e-5 * max(map(abs, oracle[name])))
