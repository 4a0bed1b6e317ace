"""Requests that nobody prepared: regions without salts, and parameters that could kill an engine."""

import json
import os
import subprocess
import sys

import pytest
from conftest import CHECKOUT, RUNNER_V2, python_path


@pytest.fixture(
    scope="module",
    params=[pytest.param((2000, {})), pytest.param((50, RUNNER_V2), marks=pytest.mark.long)],
    ids=["v1", "v2"],
)
def answers(request, tiny_models, tmp_path_factory):
    objects, environment = request.param
    output = tmp_path_factory.mktemp("raw") / "answers.json"
    job = {"model": str(tiny_models["llama"]), "objects": objects, "output": str(output)}
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": python_path(CHECKOUT)} | environment
    command = [sys.executable, str(CHECKOUT / "tests/inline/raw_parameters.py")]
    done = subprocess.run(command, input=json.dumps(job), env=environment, text=True, capture_output=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(output.read_text())
    assert found["v2"] == found["async"] == ("VLLM_USE_V2_MODEL_RUNNER" in request.param[1])
    return found


def test_a_region_without_its_salt_reads_no_other_regions_blocks(answers):
    found = answers["regions"]
    assert found["second"] == found["alone"] != found["first"]
    assert found["cached"] == 0
    assert found["again"] == found["first"]
    assert found["cached_again"] >= 384


def test_what_the_model_cannot_do_ends_the_request_with_words_for_its_client(answers):
    words = answers["refusals"]
    assert "head [99, 99] does not exist" in words["head"]
    assert "[2, 900) lies outside the 40 tokens" in words["span"]
    assert "this engine was started with attnlrp" in words["rule"]


def test_no_parameters_kill_the_engine_or_change_another_answer(answers):
    counts = answers["fuzz"]
    assert answers["near"] >= answers["drawn"] / 2
    assert counts["known"] == counts["hundreds"] >= answers["drawn"] / 100
    assert counts["refused"] + counts["taken"] == answers["drawn"]
    assert counts["error"] + counts["length"] == counts["taken"]
    # All three happen.
    assert min(counts["refused"], counts["error"], counts["length"]) > 0
