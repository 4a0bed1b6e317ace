"""benchmarks.steering: what it measures is the steered model's, whole, one answer at a time."""

import json

import pytest
import torch

from agd_vllm.attribution.hf_model import load_model
from agd_vllm.steering.pairs import Pair
from benchmarks import steering

LAYER = 1
PAIRS = [Pair([5, 6, 7, 8, 9], [0], [10, 11], [12]), Pair([15, 6, 7], [0], [10, 11, 13], [12, 14])]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("name", ["llama-3", "qwen3"])
def test_log_odds_are_those_of_a_hook(tiny_models, monkeypatch, name, norm):
    monkeypatch.setattr(steering, "BATCH_TOKENS", 12)
    hf = load_model(str(tiny_models[name]))
    torch.manual_seed(0)
    held_out, offset = steering.HeldOut(hf, PAIRS, LAYER), torch.randn(32)
    ours, plain = held_out.log_odds(offset, norm), held_out.log_odds(0 * offset, norm)

    def hook(_module, _inputs, output):
        moved = output + offset
        return moved * output.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True) if norm else moved

    def literal(pair):
        odds = 0.0
        for sign, answer in ((1, pair.preferred), (-1, pair.dispreferred)):
            logits = hf.model(torch.tensor([pair.prompt + answer])).logits[0, len(pair.prompt) - 1 : -1]
            odds += sign * logits.log_softmax(-1)[range(len(answer)), answer].sum().item()
        return odds

    assert plain == pytest.approx([literal(pair) for pair in PAIRS], abs=1e-4)
    hf.stack.layers[LAYER].register_forward_hook(hook)
    assert ours == pytest.approx([literal(pair) for pair in PAIRS], abs=1e-4)
    assert ours != pytest.approx(plain, abs=1e-2)


def test_the_true_answer_is_preferred_over_the_first_false_one(tmp_path):
    question = {"question": "Why?", "mc1_targets": {"No.": 0, "So.": 1, "Never.": 0}}
    (tmp_path / "data.json").write_text(json.dumps([question]))
    (row,) = steering.rows(str(tmp_path / "data.json"), 1, 0)
    assert row["prompt"] == "Q: Why?\nA:"
    assert row["metadata"] == {"preferred": " So.", "dispreferred": " No."}
