"""Gate reports from vLLM's process to the actor: all of them arrive, however many candidates they have."""

import asyncio
import logging
import threading
import time

import pytest

from agd_vllm.engine import channel
from agd_vllm.engine.channel import MAX_TOP_K, EngineStep, GateReceiver, GateSender, ReportsLost
from agd_vllm.engine.last_words import report_failures


@pytest.fixture
def receiver():
    receiver = GateReceiver(lambda step: steps.append(step))
    steps = receiver.steps = []
    yield receiver
    receiver.close()


@pytest.mark.parametrize("candidates", [2, 100, MAX_TOP_K])
def test_reports_arrive_whatever_their_size(receiver, candidates):
    sender = GateSender(receiver.path)
    ids = [2**31 - 1 - index for index in range(candidates)]
    probs = [0.123456789] * candidates
    reports = [(key, 7, 3.5, ids, probs) for key in range(64)]
    for key in range(64):
        receiver.expect(key)
    # A full queue blocks the sender until the receiver reads.
    sending = threading.Thread(target=sender.send, args=(reports, EngineStep(1.0, 2.0, 3.0, 64)), daemon=True)
    sending.start()
    deadline = time.monotonic() + 20
    while not receiver.steps and time.monotonic() < deadline:
        receiver.drain()
    for key in range(64):
        gate = asyncio.run(receiver.take(key, 7))
        assert (gate.step, gate.entropy, list(gate.candidate_ids), list(gate.candidate_probs)) == (7, 3.5, ids, probs)
    assert len(receiver.steps) == 1


def test_the_latest_report_of_a_row_counts_and_only_for_its_step(receiver, monkeypatch):
    monkeypatch.setattr(channel, "REPORT_S", 0.05)
    sender = GateSender(receiver.path)
    receiver.expect(1)
    sender.send([(1, 4, 2.0, [5, 6], [0.5, 0.4])])
    sender.send([(1, 5, 2.5, [7, 8], [0.5, 0.4])])
    assert asyncio.run(receiver.take(1, 5)).candidate_ids == (7, 8)
    with pytest.raises(LookupError, match="step 6"):
        asyncio.run(receiver.take(1, 6))


def test_reports_that_nobody_expects_are_not_kept(receiver):
    sender = GateSender(receiver.path)
    receiver.expect(1)
    receiver.forget(1)
    sender.send([(1, 4, 2.0, [5, 6], [0.5, 0.4])])
    receiver.drain()
    assert not receiver._latest


def test_a_report_may_come_after_its_token(receiver):
    """On a GPU the thread that sends it races with vLLM's output; earlier steps of the row are no answer."""
    sender = GateSender(receiver.path)
    receiver.expect(1)

    async def late():
        asyncio.get_running_loop().add_reader(receiver.fileno(), receiver.drain)
        taken = asyncio.create_task(receiver.take(1, 5))
        for step in (3, 4, 5):
            await asyncio.sleep(0.02)
            assert not taken.done()
            sender.send([(2, 5, 1.0, [1, 2], [0.5, 0.4]), (1, step, 2.0, [5, 6 + step], [0.5, 0.4])])
        return await asyncio.wait_for(taken, 5)

    assert asyncio.run(late()).candidate_ids == (5, 11)


def test_sending_to_an_actor_that_is_gone_does_not_raise(receiver):
    sender = GateSender(f"{receiver.path}-gone")
    sender.send([(1, 4, 2.0, [5, 6], [0.5, 0.4])])


def test_the_last_choice_of_a_step_counts(receiver):
    """An unfinished chunked prefill reports its first step, too."""
    sender = GateSender(receiver.path)
    sender.send_choices([(1, 0, 70), (2, 0, 80)])
    sender.send_choices([(1, 0, 71)])
    assert receiver.take_choice(1, 0) == 71
    assert receiver.take_choice(2, 0) == 80
    with pytest.raises(LookupError, match="step 0"):
        receiver.take_choice(1, 0)


def test_entropies_are_kept_for_rows_that_record_them_until_these_are_forgotten(receiver):
    sender = GateSender(receiver.path)
    receiver.record_entropies(1)
    sender.send_entropies([(1, 0, 9.0), (2, 0, 9.0)])
    sender.send_entropies([(1, 0, 0.5), (1, 1, 1.5)])
    assert receiver.entropies(1, range(2)) == [0.5, 1.5]
    with pytest.raises(LookupError):
        receiver.entropies(1, range(3))
    receiver.forget(1)
    sender.send_entropies([(1, 2, 9.0)])
    receiver.drain()
    assert not receiver._entropies


def test_entropies_of_many_rows_fit(receiver):
    sender = GateSender(receiver.path)
    rows = range(5000)
    for key in rows:
        receiver.record_entropies(key)
    sending = threading.Thread(target=sender.send_entropies, args=([(key, 2**31, 0.1) for key in rows],), daemon=True)
    sending.start()
    deadline = time.monotonic() + 20
    while sending.is_alive() and time.monotonic() < deadline:
        receiver.drain()
    assert [receiver.entropies(key, range(2**31, 2**31 + 1)) for key in rows] == [[0.1]] * 5000


def test_what_vllm_logs_with_its_exception_is_known_to_the_actor(receiver):
    report_failures()
    log = logging.getLogger("vllm.v1.engine.core")
    try:
        log.error("a message without one")
        receiver.drain()
        assert receiver.failure is None
        try:
            raise ValueError("no such head size\nand more")
        except ValueError:
            log.exception("EngineCore encountered a fatal error.")
    finally:
        logging.getLogger("vllm").handlers.pop()
    receiver.drain()
    assert receiver.failure == "ValueError: no such head size"


GUIDED = (2.0, [5, 9], [0.5, 0.25], [0.1, 0.9])


def followed(receiver, *samples):
    receiver.follow(1)
    sender = GateSender(receiver.path)
    for sample in samples:
        sender.send_samples([sample])
    receiver.drain()
    return receiver


def test_every_sample_of_a_followed_row_is_known_and_guided_ones_are_its_steps(receiver):
    followed(receiver, (1, 0, None), (1, 1, GUIDED), (2, 0, GUIDED))
    (step,) = receiver.guided_steps(1, [4, 9])
    assert (step.step, step.chosen_id, step.greedy_id, step.scores) == (1, 9, 5, [0.1, 0.9])
    receiver.forget(1)


@pytest.mark.parametrize(
    ("samples", "tokens"),
    [
        ([(1, 0, None), (1, 2, GUIDED)], [4, 4, 9]),  # one in the middle is missing
        ([(1, 0, None)], [4, 9]),  # the last one is
        ([(1, 0, GUIDED)], [5]),  # another token was sampled
    ],
)
def test_a_row_whose_reports_are_not_complete_is_told(receiver, monkeypatch, samples, tokens):
    monkeypatch.setattr(channel, "REPORT_S", 0.05)
    followed(receiver, *samples)
    with pytest.raises(ReportsLost):
        asyncio.run(receiver.take_steps(1, tokens))


@pytest.mark.parametrize("seconds", [0.002, 0.2])
def test_steps_are_awaited_until_the_last_token_is_reported(receiver, seconds):
    sender = GateSender(receiver.path)
    rows = range(64)
    for key in rows:
        receiver.follow(key)

    async def late():
        asyncio.get_running_loop().add_reader(receiver.fileno(), receiver.drain)
        taken = asyncio.gather(*(receiver.take_steps(key, [4, 9]) for key in rows))
        for step, guided in ((0, None), (1, GUIDED)):
            await asyncio.sleep(seconds)
            assert not taken.done()
            sender.send_samples([(key, step, guided) for key in rows])
        return await asyncio.wait_for(taken, 5)

    assert [[step.chosen_id for step in steps] for steps in asyncio.run(late())] == [[9]] * 64
    assert not receiver._awaited


def test_a_sample_computed_again_neither_adds_nor_replaces_a_step(receiver):
    again = (1.0, [9, 5], [0.5, 0.25], [0.3, 0.2])
    followed(receiver, (1, 0, GUIDED), (1, 0, again), (1, 1, None), (1, 0, None))
    (step,) = receiver.guided_steps(1, [9, 4])
    assert step.scores == GUIDED[3]


def test_steps_past_a_stop_string_are_left_out(receiver):
    followed(receiver, (1, 0, None), (1, 1, GUIDED))
    assert receiver.guided_steps(1, [4]) == []
