"""Passes that are padded to a few sizes, as on a GPU, against reverse mode; what they launch: tests/interpreted."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from requests_for_tiny import as_request, long_request
from tiny_oracle import MODELS, assert_close

from agd_vllm.attribution.forward import ForwardScorer
from agd_vllm.attribution.scorer import RULES

SIZES = (3, 64, 200, 512)


@pytest.mark.parametrize("name", MODELS)
def test_padded_passes_of_a_cpus_kernels_equal_reverse_mode(tiny_models, tiny_cases, tiny_oracle, name):
    """All in one pass, then each by itself."""
    requests = [as_request(case) for case in tiny_cases[name]]
    for rule in RULES:
        scorer = ForwardScorer(str(tiny_models[name]), rule=rule)
        scorer.tangents.static.sizes = SIZES
        assert_close(scorer.score(requests), tiny_oracle[rule][name])
        for request, theirs in zip(requests, tiny_oracle[rule][name], strict=True):
            scorer.discard(request.sequence)
            assert_close(scorer.score([request]), [theirs])


def assert_triton_equals_reverse_mode(runs, tiny_models, tiny_cases, tiny_oracle, tmp_path) -> None:
    """Of each (model, rule) a request with spans and heads."""
    job = {
        "output": str(tmp_path / "scores.json"),
        "runs": [(str(tiny_models[name]), rule, tiny_cases[name][2:3]) for name, rule in runs],
    }
    command = [sys.executable, str(Path(__file__).parent / "triton_scores.py")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, input=json.dumps(job), text=True, check=True, timeout=900)
    scores = json.loads((tmp_path / "scores.json").read_text())
    for (name, rule), ours in zip(runs, scores, strict=True):
        assert_close(ours, tiny_oracle[rule][name][2:3])


def test_padded_passes_of_a_gpus_kernels_equal_reverse_mode(tiny_models, tiny_cases, tiny_oracle, tmp_path):
    runs = [("qwen2-window", "cplrp"), ("qwen3", "ixg")]
    assert_triton_equals_reverse_mode(runs, tiny_models, tiny_cases, tiny_oracle, tmp_path)


@pytest.mark.long
def test_padded_passes_of_a_gpus_kernels_equal_reverse_mode_for_all_families_and_rules(
    tiny_models, tiny_cases, tiny_oracle, tmp_path
):
    runs = list(itertools.product(MODELS, RULES))
    assert_triton_equals_reverse_mode(runs, tiny_models, tiny_cases, tiny_oracle, tmp_path)


def test_a_sequence_beyond_the_greatest_length_is_refused_and_nothing_else(tiny_models):
    scorer = ForwardScorer(str(tiny_models["llama"]), max_model_len=60)
    fits, too_long = long_request("fits", 60), long_request("long", 61)
    with pytest.raises(ValueError, match=r"^sequence long: 61 tokens, .* at most 60; raise --max-model-len") as refused:
        scorer.score([fits, too_long])
    assert "\n" not in str(refused.value)
    (scores,) = scorer.score([fits])
    assert_close([scores], ForwardScorer(str(tiny_models["llama"])).score([fits]))
