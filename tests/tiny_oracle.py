"""Requests to tiny models of every architecture, and what reverse mode (lxt's rules, plain autograd for ixg) scores."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

ATTRIBUTION = Path(__file__).parent / "attribution"
sys.path.append(str(ATTRIBUTION))

import tiny  # noqa: E402
from requests_for_tiny import random_case  # noqa: E402

from agd_vllm.attribution.scorer import RULES  # noqa: E402

MODELS = sorted(tiny.configs())
CASES = 6
BOUND = 1e-5


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return {name: tiny.save(name, folder) for name in MODELS}


@pytest.fixture(scope="session")
def tiny_cases(tiny_models) -> dict[str, list[dict]]:
    rng = random.Random(7)
    kinds = ("spans", "heads", "both")
    return {name: [random_case(rng, f"{name}-{i}", kinds[i % 3]) for i in range(CASES)] for name in tiny_models}


@pytest.fixture(scope="session")
def tiny_oracle(tiny_models, tiny_cases, tmp_path_factory) -> dict[str, dict[str, list[list[float]]]]:
    """Scores by rule, then by model."""
    folder = tmp_path_factory.mktemp("oracle")
    scores = {}
    for rule in RULES:
        job = {
            "rule": rule,
            "batched": True,
            "output": str(folder / f"{rule}.json"),
            "models": {str(tiny_models[name]): tiny_cases[name] for name in tiny_models},
        }
        command = [sys.executable, str(ATTRIBUTION / "oracle.py")]
        subprocess.run(command, input=json.dumps(job), text=True, check=True, timeout=500)
        answers = json.loads((folder / f"{rule}.json").read_text())
        scores[rule] = {name: answers[str(tiny_models[name])] for name in tiny_models}
        scores[rule] |= {f"{name} batched": answers[f"{tiny_models[name]} batched"] for name in tiny_models}
    return scores


def assert_close(ours, theirs):
    """Within BOUND of the step's largest score: single ones cancel to any size."""
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, abs=BOUND * max(map(abs, b)), rel=0)
