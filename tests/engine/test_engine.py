"""The gated engine against plain vLLM's greedy decoding, and the row's end in every form. Float32 throughout."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from conftest import CHECKOUT, RUNNER_V2, Chooser, first_candidate, last_candidate, plain_vllm, prepared_demo_rows
from runner_v2.decode import outcomes

from agd_vllm.records import PreparedRow, Roi, Span

INFINITY = float("inf")
REGION = Roi((Span(0, 2),))


@pytest.fixture(scope="module")
def rows(smollm2) -> list[PreparedRow]:
    return prepared_demo_rows(smollm2, 24, 40)


@pytest.fixture(scope="module")
def plain(smollm2, rows, tmp_path_factory):
    """Plain vLLM on the demo rows, then on the rows of the stop and length tests, in one start."""
    jobs = [(row.prompt_token_ids, {"max_tokens": row.max_tokens}) for row in rows]
    first = rows[0].prompt_token_ids
    jobs += [
        (first, {"max_tokens": 40, "stop": [" the"]}),
        (first, {"max_tokens": 40, "stop": [" the"], "include_stop_str_in_output": False, "min_tokens": 30}),
        (first, {"max_tokens": 90, "min_tokens": 80}),
    ]
    outputs = plain_vllm(smollm2, jobs, tmp_path_factory.mktemp("plain") / "outputs.json")
    return outputs[: len(rows)], outputs[len(rows) :]


def assert_equal(decoded, plain):
    for ours, theirs in zip(decoded, plain, strict=True):
        assert not isinstance(ours, Exception), ours
        assert ours.token_ids == theirs["token_ids"], ours.id
        assert ours.finish_reason == theirs["finish_reason"]
        assert ours.text == theirs["text"]


def test_an_ungated_run_equals_plain_vllm(engine, rows, plain):
    assert_equal(engine.decode(rows), plain[0])


def test_a_gate_that_never_opens_equals_plain_vllm(engine, rows, plain):
    chooser = Chooser(first_candidate)
    assert_equal(engine.decode(rows, chooser, tau=INFINITY), plain[0])
    assert not chooser.gates


def test_taking_the_top_candidate_at_every_gate_equals_plain_vllm(engine, rows, plain):
    chooser = Chooser(first_candidate)
    decoded = engine.decode(rows, chooser, tau=0.0)
    assert_equal(decoded, plain[0])
    assert sum(row.num_guided for row in decoded) > 100
    for row, prepared in zip(decoded, rows, strict=True):
        contexts = chooser.contexts.get(row.id, [])
        for step, context in zip(row.steps, contexts, strict=True):
            assert context == prepared.prompt_token_ids + row.token_ids[: step.step]
            assert row.token_ids[step.step] == step.chosen_id
            assert len(step.candidate_ids) >= 2
            assert step.candidate_probs == sorted(step.candidate_probs, reverse=True)
            assert step.candidate_probs[-1] >= 0.05


def test_the_selected_token_is_what_is_decoded_on(engine, rows):
    decoded = engine.decode(rows[:6], Chooser(last_candidate), tau=0.5)
    assert sum(step.chosen_id != step.greedy_id for row in decoded for step in row.steps) > 20
    # What vLLM made of the selected tokens equals a greedy decode of prompt and output up to any changed step.
    for row, prepared in zip(decoded, rows, strict=False):
        changed = [step.step for step in row.steps if step.chosen_id != step.greedy_id]
        following = [step.step for step in row.steps if step.step > changed[0]] + [len(row.token_ids)]
        prefix = row.token_ids[: changed[0] + 1]
        replay = PreparedRow("replay", prepared.prompt_token_ids + prefix, REGION, following[0] - changed[0] + 1)
        (again,) = engine.decode([replay])
        until = following[0] - changed[0] - 1
        assert again.token_ids[:until] == row.token_ids[changed[0] + 1 : following[0]]


def test_pausing_keeps_the_kv_cache(engine, rows):
    """Every token is computed once: vLLM never sees the prompt again after a pause."""
    llm = engine.engine._llm
    engine.run(llm.collective_rpc("start_counting"))
    decoded = engine.decode(rows[:4], Chooser(first_candidate), tau=0.0)
    (computed,) = engine.run(llm.collective_rpc("computed_tokens"))
    assert sum(row.num_guided for row in decoded) > 20
    assert 0 < computed <= sum(len(row.prompt_token_ids) + len(row.token_ids) for row in decoded)


def test_a_stop_string_ends_a_row_as_in_vllm(engine, rows, plain):
    stopped, late, _ = plain[1]
    first = rows[0]
    ours = [
        dataclasses.replace(first, id="stop", max_tokens=40, stop=(" the",)),
        dataclasses.replace(first, id="late", max_tokens=40, stop=(" the",), min_tokens=30),
    ]
    for pool in (None, Chooser(first_candidate)):
        decoded = engine.decode(ours, pool, tau=0.0)
        assert_equal(decoded, [stopped, late])
    assert stopped["finish_reason"] == "stop"
    assert " the" not in decoded[0].text


def test_min_tokens_holds_back_eos_as_in_vllm(engine, rows, plain):
    row = dataclasses.replace(rows[0], max_tokens=90, min_tokens=80)
    assert_equal(engine.decode([row], Chooser(first_candidate), tau=0.0), plain[1][2:])


def test_the_end_may_fall_on_a_selected_token(engine, rows):
    """max_tokens, a stop token and a stop string, each met by a token that was selected at a gate."""
    chooser = Chooser(last_candidate)
    (whole,) = engine.decode([rows[3]], chooser, tau=0.0)
    step = next(step for step in whole.steps if step.step >= 5)
    upto = whole.token_ids[: step.step + 1]

    (short,) = engine.decode([dataclasses.replace(rows[3], max_tokens=step.step + 1)], chooser, tau=0.0)
    assert (short.token_ids, short.finish_reason) == (upto, "length")

    fresh = next(s for s in whole.steps if whole.token_ids.index(s.chosen_id) == s.step and s.step > 0)
    row = dataclasses.replace(rows[3], stop_token_ids=(fresh.chosen_id,))
    (stopped,) = engine.decode([row], chooser, tau=0.0)
    assert (stopped.token_ids, stopped.finish_reason) == (whole.token_ids[: fresh.step + 1], "stop")

    word = engine.tokenizer.decode([fresh.chosen_id])
    (cut,) = engine.decode([dataclasses.replace(rows[3], stop=(word,))], chooser, tau=0.0)
    assert cut.finish_reason == "stop"
    assert word not in cut.text
    assert whole.text.startswith(cut.text)


def test_a_row_may_end_at_max_model_len_on_a_selected_token(engine, rows):
    """Resuming vLLM at the limit would kill it. With no floor every step is gated, the last one, too."""
    limit = engine.engine.max_model_len
    chooser = Chooser(lambda gate: [float(token not in engine.info.eos_ids) for token in gate.candidate_ids])
    full = PreparedRow("full", (rows[0].prompt_token_ids * 40)[: limit - 12], REGION, 12)
    for _ in range(2):  # the engine is alive and well afterwards
        (decoded,) = engine.decode([full], chooser, tau=0.0, min_prob=0.0)
        assert decoded.finish_reason == "length"
        assert len(decoded.prompt_token_ids) + len(decoded.token_ids) == limit
        assert decoded.steps[-1].step == len(decoded.token_ids) - 1


def test_eos_may_be_a_candidate(engine, rows):
    eos = engine.tokenizer.eos_token_id

    def prefer_eos(gate):
        return [float(token == eos) for token in gate.candidate_ids]

    chooser = Chooser(prefer_eos)
    decoded = engine.decode([dataclasses.replace(row, max_tokens=90) for row in rows], chooser, tau=0.0)
    ended = [row for row in decoded if row.steps and row.steps[-1].chosen_id == eos]
    assert ended, "no row met EOS among its candidates"
    for row in ended:
        assert row.finish_reason == "stop"
        assert row.token_ids[-1] == eos
        assert "<|im_end|>" not in row.text


def test_pause_is_never_emitted(engine, rows):
    pause = engine.info.pause_id
    for row in engine.decode(rows, Chooser(last_candidate), tau=0.0):
        assert pause not in row.token_ids


def test_nan_scores_fall_back_to_the_greedy_token_and_are_counted(engine, rows, plain):
    def broken(gate):
        return [float("nan")] + [1.0] * (len(gate.candidate_ids) - 1)

    decoded = engine.decode(rows[:3], Chooser(broken), tau=0.0)
    assert_equal(decoded, plain[0][:3])
    assert engine.faults.counts["nan_scores"] == sum(row.num_guided for row in decoded) > 0


@pytest.mark.parametrize(
    ("scheduling", "count", "max_tokens"),
    [
        ("one step at a time", 4, 12),
        pytest.param("async", 6, 24, marks=pytest.mark.long),
    ],
)
def test_model_runner_v2_decodes_alike(engine, smollm2, tmp_path, scheduling, count, max_tokens):
    """The runner that GPUs have, its kernels interpreted: prompts in chunks, and blocks for a few rows at a time."""
    job = {
        "model": str(smollm2),
        "count": count,
        "max_tokens": max_tokens,
        "engine_args": {
            "async_scheduling": scheduling == "async",
            "max_model_len": 256,
            "max_num_batched_tokens": 48,
            "block_size": 32,
            "num_gpu_blocks_override": 20,
            "kv_cache_memory_bytes": None,
        },
        "output": str(tmp_path / "rows.json"),
    }
    command = [sys.executable, str(CHECKOUT / "tests/runner_v2/decode.py")]
    subprocess.run(command, input=json.dumps(job), text=True, check=True, env=os.environ | RUNNER_V2, timeout=580)
    result = json.loads((tmp_path / "rows.json").read_text())
    assert (result["v2"], result["async"]) == (True, scheduling == "async")
    expected = outcomes(engine, smollm2, job["count"], job["max_tokens"])
    assert sum(len(row["steps"]) for row in expected) > 0.28 * count * max_tokens
    for ours, theirs in zip(result["rows"], expected, strict=True):
        assert (ours["token_ids"], ours["finish_reason"]) == (theirs["token_ids"], theirs["finish_reason"])
        for (step, entropy, *candidates), (its_step, its_entropy, *its_candidates) in zip(
            ours["steps"], theirs["steps"], strict=True
        ):
            assert (step, candidates) == (its_step, its_candidates)
            assert entropy == pytest.approx(its_entropy, rel=1e-4)
