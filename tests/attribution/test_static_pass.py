"""Passes that are padded to a few sizes, as on a GPU, against reverse mode; what they launch: tests/interpreted."""

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
    """Whole sequences, then each by itself once more without its last token, and with it."""
    requests = [as_request(case) for case in tiny_cases[name]]
    for rule in RULES:
        scorer = ForwardScorer(str(tiny_models[name]), rule=rule)
        scorer.tangents.static.sizes = SIZES
        assert_close(scorer.score(requests), tiny_oracle[rule][name])
        for request, theirs in zip(requests, tiny_oracle[rule][name], strict=True):
            scorer.discard(request.sequence)
            assert_close(scorer.score([request]), [theirs])


def test_padded_passes_of_a_gpus_kernels_equal_reverse_mode(tiny_models, tiny_cases, tiny_oracle, tmp_path):
    """A request with spans and heads, and the beginning of another's pass; all families and rules."""
    cases = {str(tiny_models[name]): tiny_cases[name][2:3] for name in MODELS}
    job = {"output": str(tmp_path / "scores.json"), "models": cases}
    command = [sys.executable, str(Path(__file__).parent / "triton_scores.py")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, input=json.dumps(job), text=True, check=True, timeout=500)
    scores = json.loads((tmp_path / "scores.json").read_text())
    for rule in RULES:
        for name in MODELS:
            assert_close(scores[rule][str(tiny_models[name])], tiny_oracle[rule][name][2:3])


def test_a_sequence_beyond_the_greatest_length_is_refused_and_nothing_else(tiny_models):
    scorer = ForwardScorer(str(tiny_models["llama"]), max_model_len=60)
    fits, too_long = long_request("fits", 60), long_request("long", 61)
    with pytest.raises(ValueError, match=r"^sequence long: 61 tokens, .* at most 60; raise --max-model-len") as refused:
        scorer.score([fits, too_long])
    assert "\n" not in str(refused.value)
    (scores,) = scorer.score([fits])
    assert_close([scores], ForwardScorer(str(tiny_models["llama"])).score([fits]))
