"""Forward mode against reverse mode (lxt's rules, plain autograd for ixg) on tiny models of every architecture."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from requests_for_tiny import as_request, long_request
from tiny_oracle import CASES, MODELS, assert_close

from agd_vllm.attribution import forward
from agd_vllm.attribution.forward import ForwardScorer
from agd_vllm.attribution.scorer import RULES
from agd_vllm.kernels import compiled
from agd_vllm.records import Roi, ScoreRequest, Span


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are tiny: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def scorer(tiny_models):
    """Forward scorers, each loaded once."""
    loaded: dict[tuple[str, str], ForwardScorer] = {}

    def load(name: str, rule: str) -> ForwardScorer:
        if (name, rule) not in loaded:
            loaded[name, rule] = ForwardScorer(str(tiny_models[name]), rule=rule)
        return loaded[name, rule]

    return load


def fresh(request: ScoreRequest, name: str) -> ScoreRequest:
    return dataclasses.replace(request, sequence=name)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_a_full_pass_equals_reverse_mode(scorer, tiny_cases, tiny_oracle, name, rule):
    requests = [as_request(case) for case in tiny_cases[name]]
    assert_close(scorer(name, rule).score(requests), tiny_oracle[rule][name])


@pytest.mark.parametrize("name", MODELS)
def test_a_full_pass_without_compiled_kernels_equals_reverse_mode(
    monkeypatch, tiny_models, tiny_cases, tiny_oracle, name
):
    monkeypatch.setattr(compiled, "available", lambda: False)
    for rule in RULES:
        scorer = ForwardScorer(str(tiny_models[name]), rule=rule)
        assert scorer.tangents.ops.kernels is None
        assert_close(scorer.score([as_request(case) for case in tiny_cases[name]]), tiny_oracle[rule][name])


def test_bfloat16_on_a_cpu_without_instructions_for_it(tiny_models):
    """oneDNN refuses to lay its weights out there."""
    program = f"""
from agd_vllm.attribution.forward import ForwardScorer
from agd_vllm.records import Roi, ScoreRequest, Span
scorer = ForwardScorer({str(tiny_models["llama"])!r}, dtype="bfloat16")
print(len(scorer.score([ScoreRequest("a", 0, [3, 4, 5], Roi((Span(0, 1),)), (6, 7))])[0]))
"""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "2", done.stderr


@pytest.mark.parametrize("name", MODELS)
def test_rules_differ(tiny_oracle, name):
    """Else the comparison above could pass with one rule for all."""
    attnlrp, cplrp, ixg = (tiny_oracle[rule][name] for rule in RULES)
    assert attnlrp != cplrp and attnlrp != ixg and cplrp != ixg


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_padding_and_batches_do_not_change_the_reference(tiny_oracle, name, rule):
    assert_close(tiny_oracle[rule][f"{name} batched"], tiny_oracle[rule][name])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_split_into_chunks_and_batches_gives_the_same_scores(scorer, tiny_cases, tiny_oracle, data):
    """Sequences grow by chunks of any size, in calls that hold any of them; the last call's scores are the oracle's."""
    name, rule = data.draw(st.sampled_from(MODELS)), data.draw(st.sampled_from(RULES))
    chosen = data.draw(st.lists(st.integers(0, CASES - 1), min_size=1, max_size=4, unique=True))
    run = data.draw(st.integers(0, 10**9))
    forward_scorer = scorer(name, rule)
    requests = {i: fresh(as_request(tiny_cases[name][i]), f"split-{run}-{i}") for i in chosen}
    # A region must lie within the tokens that have been sent: prompts hold it, outputs follow.
    held = dict.fromkeys(chosen, 0)
    scores = {}
    while any(held[i] < len(requests[i].token_ids) for i in chosen):
        batch = []
        for i in chosen:
            length, reach = len(requests[i].token_ids), max((s.end for s in requests[i].roi.spans), default=1)
            if held[i] < length and (data.draw(st.booleans()) or len(batch) == 0):
                batch.append((i, data.draw(st.integers(max(held[i] + 1, reach), length))))
        answers = forward_scorer.score(
            [
                dataclasses.replace(requests[i], start=held[i], token_ids=requests[i].token_ids[held[i] : end])
                for i, end in batch
            ]
        )
        for (i, end), answer in zip(batch, answers, strict=True):
            held[i], scores[i] = end, answer
    for i in chosen:
        assert_close([scores[i]], [tiny_oracle[rule][name][i]])
        forward_scorer.release(requests[i].sequence)


def computed_tokens(monkeypatch, scorer: ForwardScorer) -> list[int]:
    """Tokens of each tangent pass from now on."""
    counts: list[int] = []
    extend = scorer.tangents.extend

    def counted(segments, *rest):
        counts.append(sum(count for _, count in segments))
        return extend(segments, *rest)

    monkeypatch.setattr(scorer.tangents, "extend", counted)
    return counts


def test_a_guided_step_computes_only_new_tokens(monkeypatch, scorer):
    forward_scorer = scorer("qwen3", "attnlrp")
    request = long_request("step", 60)
    forward_scorer.score([request])
    counts = computed_tokens(monkeypatch, forward_scorer)
    scores = forward_scorer.score([dataclasses.replace(request, start=60, token_ids=[9, 10])])
    assert counts == [2]
    whole = dataclasses.replace(request, sequence="whole", token_ids=[*request.token_ids, 9, 10])
    assert_close(scores, forward_scorer.score([whole]))


def test_a_shared_prompt_is_computed_once(monkeypatch, tiny_models):
    forward_scorer = ForwardScorer(str(tiny_models["llama"]))
    counts = computed_tokens(monkeypatch, forward_scorer)
    requests = [long_request(f"shared-{i}", 200, tail=i) for i in range(8)]
    together = forward_scorer.score(requests)
    assert sum(counts) < 2 * 200
    alone = [ForwardScorer(str(tiny_models["llama"])).score([request])[0] for request in requests[:2]]
    assert_close(together[:2], alone)
    # The same tokens under another region share nothing.
    counts.clear()
    forward_scorer.score([dataclasses.replace(requests[0], sequence="other", roi=Roi((Span(0, 3),)))])
    assert sum(counts) == 200


def test_long_prompts_are_prefilled_in_bounded_passes(monkeypatch, tiny_models):
    monkeypatch.setattr(forward, "PASS_TOKENS", 64)
    forward_scorer = ForwardScorer(str(tiny_models["gemma3"]))
    counts = computed_tokens(monkeypatch, forward_scorer)
    bounded = forward_scorer.score([long_request(f"long-{i}", 150 + i) for i in range(3)])
    assert max(counts) <= 64
    monkeypatch.setattr(forward, "PASS_TOKENS", 4096)
    assert_close(
        bounded, ForwardScorer(str(tiny_models["gemma3"])).score([long_request(f"l-{i}", 150 + i) for i in range(3)])
    )


def test_a_full_cache_forgets_and_asks_for_the_whole_sequence(tiny_models):
    forward_scorer = ForwardScorer(str(tiny_models["llama"]), cache_bytes=1 << 20)
    requests = [long_request(f"evicted-{i}", 300 + i) for i in range(12)]
    whole = [forward_scorer.score([request])[0] for request in requests]
    assert forward_scorer.cache.num_bytes <= 1 << 20
    follow_up = dataclasses.replace(requests[0], start=300, token_ids=[8])
    assert forward_scorer.score([follow_up]) == [None]
    assert_close(forward_scorer.score([requests[0]]), whole[:1])
    # A sequence larger than the whole budget is scored all the same.
    tight = ForwardScorer(str(tiny_models["llama"]), cache_bytes=1)
    assert_close(tight.score(requests[:2]), whole[:2])


def test_a_sequence_sent_anew_may_be_the_donor_of_another_in_the_same_call(tiny_models):
    """It is cut back to what its new tokens share, but not before the other has copied what that one shares."""
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, tiny.VOCABULARY) for _ in range(count)]

    roi, old = Roi((Span(0, 9),)), tokens(100)
    wanted = {"a": old[:20] + tokens(200), "b": old[:80] + tokens(10)}
    requests = [ScoreRequest(name, 0, token_ids, roi, (5, 6, 7)) for name, token_ids in wanted.items()]
    scorer = ForwardScorer(str(tiny_models["llama"]))
    scorer.score([ScoreRequest("a", 0, old, roi, (5, 6, 7))])
    alone = [ForwardScorer(str(tiny_models["llama"])).score([request])[0] for request in requests]
    assert scorer.score(requests) == [pytest.approx(scores, rel=1e-4, abs=1e-7) for scores in alone]


def test_an_unknown_sequence_is_asked_for_and_the_others_are_scored(scorer, tiny_cases, tiny_oracle):
    request = as_request(tiny_cases["mistral"][0])
    lost = dataclasses.replace(request, sequence="never-seen", start=40, token_ids=[7])
    answers = scorer("mistral", "attnlrp").score([lost, fresh(request, "seen")])
    assert answers[0] is None
    assert_close(answers[1:], tiny_oracle["attnlrp"]["mistral"][:1])


@pytest.mark.parametrize(
    ("roi", "word"),
    [
        (Roi((Span(0, 99),)), "99"),
        (Roi(heads=((3, 0),)), "layer"),
        (Roi(heads=((0, 4),)), "head"),
    ],
)
def test_regions_outside_the_tokens_or_the_model_are_refused(scorer, roi, word):
    request = dataclasses.replace(long_request("bad", 20), roi=roi)
    with pytest.raises(ValueError, match=word) as refused:
        scorer("llama", "attnlrp").score([request])
    assert "\n" not in str(refused.value)


def test_quantized_weights_are_refused(tiny_models, tmp_path):
    copy = tmp_path / "quantized"
    copy.mkdir()
    for file in tiny_models["llama"].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantized"):
        ForwardScorer(str(copy))


def test_bfloat16_scores_are_near_and_forward_needs_neither_lxt_nor_a_backward_pass(tiny_models, scorer):
    """In a process of its own, where any backward pass raises."""
    program = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from agd_vllm.attribution.scorer import load_scorer
from requests_for_tiny import long_request
scorer = load_scorer("forward", {str(tiny_models["qwen2"])!r}, dtype="bfloat16")
def forbidden(*args, **kwargs): raise AssertionError("a backward pass ran")
torch.autograd.grad = torch.autograd.backward = torch.Tensor.backward = forbidden
print(scorer.score([long_request("r", 40)])[0])
assert not [name for name in sys.modules if name == "lxt" or name.startswith("lxt.")]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ours = json.loads(done.stdout.splitlines()[-1])
    (exact,) = scorer("qwen2", "attnlrp").score([long_request("bf16", 40)])
    assert ours == pytest.approx(exact, abs=0.1 * max(map(abs, exact)))
