"""An engine with hardly any room, engine-side aborts and stalls: every row ends, none hangs, none changes another."""

import asyncio
import dataclasses
import signal
import threading
import time

import pytest
from conftest import Chooser, TightEngine, first_candidate, prepared_demo_rows

from agd_vllm.engine.events import SessionFailed
from agd_vllm.records import PreparedRow, Roi, Span

REGION = Roi((Span(0, 1),))


@pytest.fixture
def engine(tight_engine):
    return tight_engine


@pytest.fixture(scope="module")
def rows(smollm2):
    return prepared_demo_rows(smollm2, 12, 16)


@pytest.fixture(scope="module")
def alone(tight_engine, rows):
    """Each row decoded on its own, every step a gate."""
    return [tight_engine.decode([row], Chooser(first_candidate), tau=0.0, min_prob=0.0)[0] for row in rows]


def assert_same(decoded, alone):
    for ours, theirs in zip(decoded, alone, strict=True):
        assert not isinstance(ours, Exception), ours
        assert ours.token_ids == theirs.token_ids


def test_a_cache_for_two_sessions_while_sixty_rows_wait(engine, rows, alone):
    stop = [row.token_ids[7:8] for row in alone]
    greedy = [
        dataclasses.replace(row, id=f"{row.id}-{turn}", max_tokens=2000, stop_token_ids=tuple(end))
        for turn in range(5)
        for row, end in zip(rows, stop, strict=True)
    ]
    assert len(greedy) == 60
    open_at_once = []

    class Watching(Chooser):
        async def score(self, *args):
            open_at_once.append(engine.engine.occupancy._open)
            return await super().score(*args)

    decoded = engine.decode(greedy, Watching(first_candidate), tau=0.0, min_prob=0.0)
    assert max(open_at_once) == 2
    assert_same(decoded[:12], decoded[12:24])
    for ours, theirs in zip(decoded, alone * 5, strict=True):
        assert not isinstance(ours, Exception), ours
        assert theirs.token_ids[: len(ours.token_ids)] == ours.token_ids
        assert ours.finish_reason == "stop"


def test_a_thousand_rows_with_every_step_guided(engine):
    prompts = [[1000 + index] for index in range(1000)]
    many = [PreparedRow(f"{index}", prompt, REGION, 2) for index, prompt in enumerate(prompts)]
    decoded = engine.decode(many, Chooser(first_candidate), tau=0.0, min_prob=0.0)
    assert [row.num_guided for row in decoded] == [len(row.token_ids) for row in decoded]


def test_a_long_prompt_beside_prompts_of_one_token(engine, rows, alone):
    """The long prompt is prefilled in chunks, which the gate sees too, and takes most of the cache."""
    long = PreparedRow("long", (rows[0].prompt_token_ids * 90)[:4000], REGION, 4)
    short = [PreparedRow(f"short-{index}", [1000 + index], REGION, 8) for index in range(12)]
    together = engine.decode([*short[:6], long, *short[6:]], Chooser(first_candidate), tau=0.0, min_prob=0.0)
    apart = [engine.decode([row], Chooser(first_candidate), tau=0.0, min_prob=0.0)[0] for row in (*short, long)]
    assert_same([*together[:6], *together[7:], together[6]], apart)
    assert apart[-1].num_guided == 4


def test_a_session_that_vllm_aborts_is_an_error_of_its_row_alone(engine, rows, alone):
    llm = engine.engine._llm

    class Aborting(Chooser):
        async def score(self, sequence, token_ids, roi, gate):
            scores = await super().score(sequence, token_ids, roi, gate)
            if sequence == rows[0].id and gate.step == 3:
                requests = list(llm.output_processor.external_req_ids)
                await llm.abort(min(requests, key=int))
            return scores

    decoded = engine.decode(rows[:3], Aborting(first_candidate), tau=0.0, min_prob=0.0)
    assert isinstance(decoded[0], SessionFailed)
    assert_same(decoded[1:], alone[1:3])
    assert_same(engine.decode(rows[:1], Chooser(first_candidate), tau=0.0, min_prob=0.0), alone[:1])


def test_a_stalled_session_is_resubmitted_from_its_tokens(engine, rows, alone):
    """vLLM's worker is stopped (SIGSTOP) for longer than the deadline, in the middle of some rows."""
    worker = engine.worker
    settings = engine.engine._settings
    engine.engine._settings = dataclasses.replace(settings, deadline_s=3.0)
    gates = []

    class Stopping(Chooser):
        async def score(self, *args):
            gates.append(1)
            if len(gates) == 20:
                worker.send_signal(signal.SIGSTOP)
                threading.Timer(5, worker.send_signal, [signal.SIGCONT]).start()
            await asyncio.sleep(0)
            return await super().score(*args)

    try:
        decoded = engine.decode(rows[:3], Stopping(first_candidate), tau=0.0, min_prob=0.0)
    finally:
        worker.send_signal(signal.SIGCONT)
        engine.engine._settings = settings
    assert engine.faults.counts["sessions_resubmitted"] >= 1
    assert_same(decoded, alone[:3])


def test_a_cancelled_row_gives_its_room_back(engine, rows, alone):
    """Rows are cancelled while they wait for scores that never come; the next ones find an empty engine."""

    class Never(Chooser):
        async def score(self, *args):
            await asyncio.Event().wait()

    from agd_vllm.strategies.agd import Agd
    from agd_vllm.strategies.row_loop import decode_row

    async def cancelled():
        loops = [
            decode_row(engine.engine, Never(None), row, engine.tokenizer, engine.info.eos_ids, engine.faults, Agd())
            for row in rows
        ]
        tasks = [asyncio.create_task(loop) for loop in loops]
        deadline = time.monotonic() + 60
        while engine.engine.occupancy.paused < TightEngine.SESSIONS:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    engine.run(cancelled())
    assert engine.engine.occupancy._open == 0
    assert_same(engine.decode(rows, Chooser(first_candidate), tau=0.0, min_prob=0.0), alone)
