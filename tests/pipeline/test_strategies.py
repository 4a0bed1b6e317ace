"""Strategies beside AGD on a real engine with chunked prefills and hardly any sessions. Float32 throughout."""

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import threading

import pyarrow.parquet as pq
import pytest
import torch
from conftest import CHECKOUT, DEMO_ROWS, RUNNER_V2, TightEngine, prepared_demo_rows
from real_runs import engine_options
from transformers import AutoModelForCausalLM, RepetitionPenaltyLogitsProcessor

from agd_vllm.records import Gate, PreparedRow, Roi, RowRefused, Span
from agd_vllm.strategies.cad import Cad
from agd_vllm.strategies.greedy import Greedy
from agd_vllm.strategies.random_candidate import Draws, RandomCandidate
from agd_vllm.strategies.row_loop import decode_row

TIE = 1e-3
ALPHA, TOKENS_PER_STEP, SESSIONS = TightEngine.ALPHA, TightEngine.TOKENS_PER_STEP, TightEngine.SESSIONS


@pytest.fixture
def engine(tight_engine):
    return tight_engine


@pytest.fixture(scope="module")
def rows(smollm2) -> list[PreparedRow]:
    return prepared_demo_rows(smollm2, 8, 16)


@pytest.fixture(scope="module")
def transformers_model(smollm2):
    # A thread, because the engine's wait for each other on the same cores.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def greedy(tight_engine, rows):
    return tight_engine.decode(rows, strategy=Greedy())


@pytest.fixture(scope="module")
def contrasted(tight_engine, rows):
    return tight_engine.decode(rows, strategy=Cad(cad_alpha=ALPHA))


def tokens(decoded) -> list[list[int]]:
    for row in decoded:
        assert not isinstance(row, Exception), row
    return [row.token_ids for row in decoded]


def test_a_repetition_penalty_is_that_of_transformers(engine, rows, transformers_model, greedy):
    penalty, some = 1.3, rows[:4]
    penalized = tokens(engine.decode(some, strategy=Greedy(repetition_penalty=penalty)))
    for row, ours in zip(some, penalized, strict=True):
        prompt = torch.tensor([row.prompt_token_ids])
        settings = {"do_sample": False, "max_new_tokens": row.max_tokens, "repetition_penalty": penalty}
        theirs = transformers_model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        assert ours == theirs[0, prompt.shape[1] :].tolist(), row.id
    assert penalized != tokens(greedy)[:4]


def next_logits(model, prompt: list[int], output: list[int]) -> torch.Tensor:
    """The logits that each token of `output` is chosen from, [tokens, vocab]."""
    with torch.inference_mode():
        return model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]


def formula(model, row: PreparedRow, output: list[int], alpha: float) -> torch.Tensor:
    """Literally (1 + alpha) * logits(with the region) - alpha * logits(without), after the same tokens so far."""
    (span,) = row.roi.spans
    without = row.prompt_token_ids[: span.start] + row.prompt_token_ids[span.end :]
    with_region = next_logits(model, row.prompt_token_ids, output)
    return (1 + alpha) * with_region - alpha * next_logits(model, without, output)


def test_cad_is_its_formula_at_every_step(contrasted, rows, greedy, transformers_model):
    assert len({len(row.prompt_token_ids) for row in rows}) > 4
    assert max(len(row.prompt_token_ids) for row in rows) > TOKENS_PER_STEP
    different = 0
    for row, output, plain in zip(rows, tokens(contrasted), tokens(greedy), strict=True):
        logits = formula(transformers_model, row, output, ALPHA)
        chosen = logits[torch.arange(len(output)), torch.tensor(output)]
        assert (logits.amax(-1) - chosen).max() < TIE, row.id
        different += output != plain
    assert different > len(rows) // 2


def test_a_penalty_on_cad_is_that_of_transformers_on_its_formula(engine, rows, contrasted, transformers_model):
    """Prompts in chunks, so with pauses beyond the first step, too; by tokens of the prompt with the region."""
    penalty, some = 1.3, rows[:4]
    penalize = RepetitionPenaltyLogitsProcessor(penalty)
    found = tokens(engine.decode(some, strategy=Cad(cad_alpha=ALPHA, repetition_penalty=penalty)))
    for row, output in zip(some, found, strict=True):
        for step, logits in enumerate(formula(transformers_model, row, output, ALPHA)):
            held = torch.tensor([row.prompt_token_ids + output[:step]])
            (logits,) = penalize(held, logits[None])
            assert logits.max() - logits[output[step]] < TIE, (row.id, step)
    assert found != tokens(contrasted)[:4]


def test_cad_without_contrast_is_greedy(engine, rows, greedy):
    assert tokens(engine.decode(rows, strategy=Cad(cad_alpha=0.0))) == tokens(greedy)


@pytest.mark.long
def test_cad_decodes_the_same_on_the_runner_of_gpus(engine, smollm2, tmp_path):
    """Model Runner V2, its kernels interpreted: the command line's answers, prompts in chunks."""
    command = [sys.executable, "-m", "agd_vllm", "decode", str(DEMO_ROWS), "--output", str(tmp_path / "out")]
    command += ["--model", str(smollm2), "--dtype", "float32", "--limit", "2"]
    command += [
        "--strategy",
        "cad",
        "--cad-alpha",
        f"{ALPHA}",
        *engine_options(max_model_len=512, max_num_batched_tokens=64),
    ]
    environment = os.environ | RUNNER_V2
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {row["id"]: row["token_ids"] for row in pq.read_table(tmp_path / "out/results").to_pylist()}
    # The rows name how many tokens they have, of which 80 are the most.
    expected = engine.decode(prepared_demo_rows(smollm2, 2, 80), strategy=Cad(cad_alpha=ALPHA))
    assert found == {row.id: row.token_ids[: len(found[row.id])] for row in expected}
    assert sum(map(len, found.values())) > 80


def test_in_step_there_are_few_pauses(engine, rows, contrasted, monkeypatch):
    """Every row pauses once, at its first step; more only where vLLM schedules the two apart."""
    taken = []
    receiver = engine.engine._receiver
    take = receiver.take_choice
    monkeypatch.setattr(receiver, "take_choice", lambda key, step: taken.append((key, step)) or take(key, step))
    again = engine.decode(rows, strategy=Cad(cad_alpha=ALPHA))
    assert tokens(again) == tokens(contrasted)
    assert len({key for key, _ in taken}) == len(rows)
    assert len(taken) < sum(map(len, tokens(again))) / 2


def test_cad_ends_rows_as_they_ask(engine, rows, contrasted):
    whole = contrasted[0]
    word = engine.tokenizer.decode(whole.token_ids[9:11])
    stopped, late, exact = engine.decode(
        [
            dataclasses.replace(rows[0], stop=(word,)),
            dataclasses.replace(rows[0], stop_token_ids=(whole.token_ids[6],), min_tokens=12),
            dataclasses.replace(rows[0], stop_token_ids=(whole.token_ids[6],)),
        ],
        strategy=Cad(cad_alpha=ALPHA),
    )
    assert stopped.finish_reason == exact.finish_reason == "stop"
    assert word not in stopped.text
    assert whole.token_ids[: len(stopped.token_ids)] == stopped.token_ids
    assert len(exact.token_ids) == whole.token_ids.index(whole.token_ids[6]) + 1
    # The stop token is masked in both sequences until then: -inf on both sides of a difference.
    assert len(late.token_ids) >= 12
    assert whole.token_ids[6] not in late.token_ids[:12]
    assert engine.info.pause_id not in late.token_ids


def test_rows_that_cad_cannot_contrast(engine, rows, greedy):
    plain = rows[0]
    everything = dataclasses.replace(plain, roi=Roi((Span(0, len(plain.prompt_token_ids)),)))
    no_region = dataclasses.replace(plain, roi=Roi())
    weightless = dataclasses.replace(plain, roi=Roi((Span(0, 4, 0.0),)))
    refused, *others = engine.decode([everything, no_region, weightless], strategy=Cad(cad_alpha=ALPHA))
    assert isinstance(refused, RowRefused) and refused.type == "region_is_prompt"
    assert tokens(others) == tokens(greedy[:1]) * 2


def test_a_stalled_pair_is_opened_anew_from_its_tokens(engine, rows, contrasted, monkeypatch):
    """vLLM's worker is stopped (SIGSTOP) for longer than the deadline, in the middle of some rows."""
    receiver, taken = engine.engine._receiver, []
    take = receiver.take_choice

    def stopping(key, step):
        taken.append(step)
        if len(taken) == 2:
            engine.worker.send_signal(signal.SIGSTOP)
            threading.Timer(4, engine.worker.send_signal, [signal.SIGCONT]).start()
        return take(key, step)

    monkeypatch.setattr(receiver, "take_choice", stopping)
    monkeypatch.setattr(engine.engine, "_settings", dataclasses.replace(engine.engine._settings, deadline_s=2.0))
    decoded = engine.decode(rows[:3], strategy=Cad(cad_alpha=ALPHA))
    assert engine.faults.counts["sessions_resubmitted"] >= 1
    assert tokens(decoded) == tokens(contrasted[:3])


def test_cancelled_pairs_give_their_room_back(engine, rows, contrasted):
    async def cancelled():
        common = (engine.tokenizer, engine.info.eos_ids, engine.faults, Cad(cad_alpha=ALPHA))
        tasks = [asyncio.create_task(decode_row(engine.engine, None, row, *common)) for row in rows]
        while engine.engine.occupancy._open < SESSIONS // 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    engine.run(cancelled())
    assert engine.engine.occupancy._open == 0
    assert sorted(engine.engine._pair_slots) == list(range(SESSIONS // 2))
    assert tokens(engine.decode(rows, strategy=Cad(cad_alpha=ALPHA))) == tokens(contrasted)


def test_random_candidates_depend_on_seed_row_and_step_only(engine, rows):
    first = engine.decode(rows, strategy=RandomCandidate(tau=0.5), seed=0)
    backwards = engine.decode(rows[::-1], strategy=RandomCandidate(tau=0.5), seed=0)[::-1]
    other = engine.decode(rows, strategy=RandomCandidate(tau=0.5), seed=1)
    assert tokens(first) == tokens(backwards)
    assert sum(a != b for a, b in zip(tokens(first), tokens(other), strict=True)) > len(rows) // 2
    steps = [(row, step) for row in first for step in row.steps]
    assert len(steps) > 30
    for row, step in steps:
        assert step.entropy >= 0.5
        assert row.token_ids[step.step] == step.chosen_id == step.candidate_ids[step.scores.index(max(step.scores))]
    assert 0.2 < sum(step.chosen_id == step.greedy_id for _, step in steps) / len(steps) < 0.7


def test_draws_are_the_same_in_every_process():
    gate = Gate(3, 1.0, (5, 6, 7), (0.5, 0.3, 0.2))
    draws = asyncio.run(Draws(0).score("row", [], Roi(), gate))
    assert draws == [0.6605182465157418, 0.6148454969669739, 0.5681974415345694]
