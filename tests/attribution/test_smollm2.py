"""Forward mode against reverse mode on the real demo model: 20 gated steps, cached from step to step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from agd_vllm.attribution.forward import ForwardScorer
from agd_vllm.records import Roi, ScoreRequest, Span

STEPS = 20
PROMPTS = [
    ("Answer only in French.", "Where can I buy bread on a Sunday?"),
    ("You are a pirate. Speak like one.", "Tell me about the weather today."),
    ("Never use the word 'the'.", "Describe a garden in spring."),
    ("Reply with a list of three items.", "What should I pack for a hike?"),
]


@pytest.fixture(scope="module")
def gated_steps(smollm2) -> list[dict]:
    """Gated steps (tau 1.734 nats, k 5, floor 0.05) of greedy outputs, as cases for `oracle.py`."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    steps = []
    for row, (system, user) in enumerate(PROMPTS):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        with torch.inference_mode():
            tokens = model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=40
            )[0].tolist()
            log_probs = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
        entropies = -(log_probs.exp() * log_probs).sum(-1)
        for position in range(len(prompt) - 1, len(tokens) - 1):
            probs, tokens_by_prob = log_probs[position].exp().topk(5)
            candidates = tokens_by_prob[probs >= 0.05].tolist()
            if entropies[position] >= 1.734 and len(candidates) > 1:
                # The system prompt: what follows <|im_start|>system\n.
                spans = [(3, 3 + len(tokenizer.encode(system)), 1.0)]
                case = {"name": f"row {row}", "token_ids": tokens[: position + 1], "spans": spans, "heads": []}
                steps.append(case | {"candidate_ids": candidates})
    assert len(steps) >= STEPS
    return [steps[index * len(steps) // STEPS] for index in range(STEPS)]


@pytest.mark.parametrize("share", [3, pytest.param(1, marks=pytest.mark.long)], ids=["every third", "all"])
def test_twenty_gated_steps_score_as_reverse_mode_does(smollm2, gated_steps, tmp_path, share):
    gated_steps = gated_steps[::share]
    job = {"rule": "attnlrp", "output": str(tmp_path / "scores.json"), "models": {str(smollm2): gated_steps}}
    command = [sys.executable, str(Path(__file__).parent / "oracle.py")]
    subprocess.run(command, input=json.dumps(job), text=True, check=True, timeout=500)
    oracle = json.loads((tmp_path / "scores.json").read_text())[str(smollm2)]

    scorer = ForwardScorer(str(smollm2))
    held: dict[str, int] = {}
    for case, theirs in zip(gated_steps, oracle, strict=True):
        start = held.get(case["name"], 0)
        roi = Roi(tuple(Span(*span) for span in case["spans"]))
        (ours,) = scorer.score(
            [ScoreRequest(case["name"], start, case["token_ids"][start:], roi, tuple(case["candidate_ids"]))]
        )
        held[case["name"]] = len(case["token_ids"])
        assert ours == pytest.approx(theirs, rel=0, abs=1e-4 * max(map(abs, theirs)))
    assert len(held) == len(PROMPTS) < len(gated_steps)
