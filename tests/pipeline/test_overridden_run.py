"""A run whose engine arguments change the model: engine and workers compute the same one."""

import json
import shutil

import pytest
import torch
from conftest import DEMO_ROWS
from transformers import AutoModelForCausalLM

from agd_vllm import Decoder
from agd_vllm.attribution.forward import ForwardScorer
from agd_vllm.records import Roi, ScoreRequest

# Far from what the model was trained with, so that no figure of the unchanged one comes near.
OVERRIDES = {"rope_parameters": {"rope_type": "linear", "rope_theta": 700.0, "factor": 3.0}, "rms_norm_eps": 0.01}


@pytest.fixture
def changed(smollm2, tmp_path) -> str:
    """The model whose own config.json says what the overrides do."""
    folder = shutil.copytree(smollm2, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config | OVERRIDES))
    return str(folder)


def test_engine_and_workers_have_the_changed_model(smollm2, changed):
    given = json.loads(DEMO_ROWS.read_text().splitlines()[0]) | {"max_tokens": 6}
    engine = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 28, "hf_overrides": OVERRIDES}
    options = {"dtype": "float32", "max_model_len": 512, "tau": 0.0, "min_prob": 0.0, "top_k": 3}
    with Decoder(str(smollm2), engine_args=engine, **options) as decoder:
        (row,) = decoder.decode([given])
    assert row.steps
    scorer = ForwardScorer(changed, dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(changed, dtype=torch.float32)
    tokens = row.prompt_token_ids + row.token_ids
    with torch.no_grad():
        probabilities = model(torch.tensor([tokens])).logits[0].softmax(-1)
    for step in row.steps:
        context = len(row.prompt_token_ids) + step.step
        theirs = probabilities[context - 1, step.candidate_ids].tolist()
        assert step.candidate_probs == pytest.approx(theirs, rel=1e-3)
        request = ScoreRequest(row.id, 0, tokens[:context], Roi(row.roi_spans), tuple(step.candidate_ids))
        (scores,) = scorer.score([request])
        assert step.scores == pytest.approx(scores, abs=1e-3 * max(map(abs, scores)))
