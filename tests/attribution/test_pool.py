"""The pool of attribution workers: what is sent where, and that every request is answered whatever a worker does."""

import asyncio
import time

import pytest
from ray.exceptions import ActorUnschedulableError, OutOfMemoryError, RayActorError, RayTaskError

from agd_vllm.attribution import pool as pool_module
from agd_vllm.attribution.batch_bounds import BatchBounds
from agd_vllm.attribution.pool import AttributionPool, RequestKillsWorker, WorkerLost
from agd_vllm.attribution.worker import ScoredBatch
from agd_vllm.faults import FaultLog
from agd_vllm.records import Gate, Roi, Span
from agd_vllm.trace import Tracer

GATE = Gate(0, 2.0, (7, 8), (0.5, 0.4))
ROI = Roi((Span(0, 1),))


class Method:
    def __init__(self, call):
        self.remote = call


class FakeWorker:
    """Scores each candidate with the length of its sequence; asks for the whole sequence as AttributionWorker would.

    `fault(requests)` and `info_fault()` are awaited first: they raise, hang, or do nothing.
    """

    def __init__(self, fault=None, info_fault=None):
        self.score, self.info = Method(self._score), Method(self._info)
        self.batches, self.released, self.lengths, self.restarts = [], [], {}, 0
        self._fault, self._info_fault = fault, info_fault

    async def _score(self, requests, released):
        await asyncio.sleep(0)
        self.batches.append(requests)
        self.released.append(released)
        for sequence in released:
            self.lengths.pop(sequence, None)
        if self._fault is not None:
            await self._fault(requests)
        return ScoredBatch([self._extend(request) for request in requests], time.time(), 0.0)

    def _extend(self, request):
        if request.start > self.lengths.get(request.sequence, 0):
            return None
        self.lengths[request.sequence] = request.start + len(request.token_ids)
        return [float(self.lengths[request.sequence])] * len(request.candidate_ids)

    async def _info(self):
        if self._info_fault is not None:
            await self._info_fault()
        self.lengths, self.restarts = {}, self.restarts + 1

    def sent(self) -> list[list[str]]:
        return [[request.sequence for request in batch] for batch in self.batches]


class Client:
    """A pool over fake workers, and what it did."""

    def __init__(self, *workers, stateful=True, deadline_s=5.0, traced=False, **bounds):
        self.workers, self.faults, self.tracer = workers, FaultLog(), Tracer(traced)
        self.pool = AttributionPool(
            list(workers), stateful, deadline_s, self.faults, self.tracer, BatchBounds(**bounds)
        )

    def score(self, sequence: str, tokens: int = 3):
        return self.pool.score(sequence, list(range(tokens)), ROI, GATE)

    async def all(self, sequences, tokens: int = 3) -> dict:
        """Scores, or the exception, of each sequence; sent at once."""
        answers = await asyncio.gather(*(self.score(name, tokens) for name in sequences), return_exceptions=True)
        return dict(zip(sequences, answers, strict=True))


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 3))


def scores(tokens: int) -> list[float]:
    return [float(tokens)] * 2


async def hang(*_):
    await asyncio.sleep(60)


def raises(*errors):
    """One after the other, the last one for ever; None raises nothing."""
    left = list(errors)

    async def act(*_):
        error = left.pop(0) if len(left) > 1 else left[0]
        if error is not None:
            raise error

    return act


def whenever(sequence: str, act):
    """`act` for every batch with that sequence."""

    async def fault(requests):
        if any(request.sequence == sequence for request in requests):
            await act()

    return fault


def raised_by_scorer(cause: Exception) -> Exception:
    """As Ray hands it over: of both types, RayTaskError's and the cause's."""
    return RayTaskError("score", "Traceback ...", cause, "ray::worker", 1, "127.0.0.1").as_instanceof_cause()


@pytest.fixture(autouse=True)
def fast_restarts(monkeypatch):
    monkeypatch.setattr(pool_module, "RESTART_POLL_S", 0.001)


@pytest.fixture
def killed(monkeypatch):
    killed = []
    monkeypatch.setattr(pool_module.ray, "kill", lambda worker, no_restart: killed.append((worker, no_restart)))
    return killed


def test_a_sequence_stays_on_its_worker_and_new_ones_go_where_there_are_fewest():
    async def scenario():
        first, second = FakeWorker(), FakeWorker()
        client = Client(first, second)
        for _ in range(2):
            await client.all("abcd")
        assert first.lengths.keys() == set("ac")
        assert second.lengths.keys() == set("bd")
        client.pool.release("b")
        await client.all("ae")
        assert second.lengths.keys() == set("de")

    run(scenario)


@pytest.mark.parametrize(("stateful", "sent"), [(True, [(0, 3), (3, 2), (5, 1)]), (False, [(0, 3), (0, 5), (0, 6)])])
def test_a_stateful_scorer_is_sent_what_is_new(stateful, sent):
    async def scenario():
        worker = FakeWorker()
        client = Client(worker, stateful=stateful)
        assert [await client.score("a", tokens) for tokens in (3, 5, 6)] == [scores(3), scores(5), scores(6)]
        assert [(request.start, len(request.token_ids)) for (request,) in worker.batches] == sent
        assert worker.batches[-1][0].token_ids[-1] == 5
        assert worker.batches[0][0].roi == ROI
        assert worker.batches[0][0].candidate_ids == GATE.candidate_ids

    run(scenario)


def test_a_worker_that_lost_a_sequence_is_sent_all_of_it():
    async def scenario():
        worker = FakeWorker()
        client = Client(worker)
        await client.all("ab")
        del worker.lengths["a"]  # evicted
        assert await client.all("ab", 4) == {"a": scores(4), "b": scores(4)}
        assert [[request.start for request in batch] for batch in worker.batches] == [[0, 0], [3, 3], [0]]
        assert client.faults.counts == {"states_rebuilt": 1}

    run(scenario)


def test_released_sequences_are_told_with_the_next_batch():
    async def scenario():
        worker = FakeWorker()
        client = Client(worker)
        await client.all("ab")
        client.pool.release("a")
        client.pool.release("unknown")
        await client.score("b", 4)
        await client.score("b", 5)
        assert worker.released == [[], ["a"], []]
        assert worker.lengths.keys() == {"b"}
        await client.score("a", 2)  # the same name again begins anew
        assert worker.batches[-1][0].start == 0
        stateless = Client(FakeWorker(), stateful=False)
        await stateless.score("a")
        stateless.pool.release("a")
        await stateless.score("b")
        assert stateless.workers[0].released == [[], []]

    run(scenario)


@pytest.mark.parametrize("outcome", ["scored", "lost", "raised", "died"])
def test_a_sequence_released_while_it_is_scored_leaves_nothing(outcome):
    async def scenario():
        under_way, go_on = asyncio.Event(), asyncio.Event()

        async def fault(requests):
            if requests[0].sequence == "a" and requests[0].start == (3 if outcome == "lost" else 0):
                under_way.set()
                await go_on.wait()
                if outcome == "lost":
                    worker.lengths.clear()
                elif outcome == "raised":
                    raise raised_by_scorer(ValueError("region"))
                elif outcome == "died":
                    raise RayActorError()

        worker = FakeWorker(fault)
        client = Client(worker)
        if outcome == "lost":
            await client.score("a")
        task = asyncio.create_task(client.score("a", 4))
        await under_way.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        client.pool.release("a")
        go_on.set()
        await client.score("b")
        assert worker.lengths.keys() == {"b"}
        assert client.pool._lanes[0].held == {"b": 3}
        assert worker.sent()[-1] == ["b"]
        assert "states_rebuilt" not in client.faults.counts

    run(scenario)


def test_a_batch_is_bounded_in_requests():
    async def scenario():
        worker = FakeWorker()
        names = [f"r{index}" for index in range(10)]
        assert await Client(worker, requests=4).all(names) == dict.fromkeys(names, scores(3))
        assert worker.sent() == [names[:4], names[4:8], names[8:]]

    run(scenario)


@pytest.mark.parametrize(
    ("stateful", "batches"),
    [(True, [["a", "b"], ["c"], ["d"], ["a", "b", "c", "d"]]), (False, [["a", "b"], ["c"], ["d"]] * 2)],
)
def test_a_batch_is_bounded_in_tokens_to_compute(stateful, batches):
    async def scenario():
        worker = FakeWorker()
        client = Client(worker, stateful=stateful, tokens=10)
        sizes = {"a": 6, "b": 4, "c": 2, "d": 30}  # d alone is above the bound
        for more in (0, stateful):
            await asyncio.gather(*(client.score(name, size + more) for name, size in sizes.items()))
        assert worker.sent() == batches

    run(scenario)


@pytest.mark.parametrize("error", [RayActorError(), OutOfMemoryError("killed by the memory monitor")])
def test_a_dead_worker_is_replaced_and_all_are_answered(error, killed):
    async def scenario():
        worker = FakeWorker(raises(error, None))
        client = Client(worker)
        assert await client.all("abc") == dict.fromkeys("abc", scores(3))
        assert worker.sent() == [["a", "b", "c"], ["a"], ["b"], ["c"]]
        assert worker.restarts == 1
        assert client.faults.counts == {"worker_restarts": 1}
        (fault,) = client.faults.drain()
        assert fault.detail == {"reason": type(error).__name__, "steps": 3}
        assert await client.all("abc", 4) == dict.fromkeys("abc", scores(4))
        assert worker.sent()[-1] == ["a", "b", "c"]

    run(scenario)
    assert not killed  # it is dead already


def test_a_new_worker_is_sent_whole_sequences():
    async def scenario():
        worker = FakeWorker()
        client = Client(worker)
        await client.all("ab")
        worker._fault = raises(RayActorError(), None)
        assert await client.score("a", 4) == scores(4)
        assert await client.score("b", 4) == scores(4)
        assert [request.start for (request,) in worker.batches[1:]] == [3, 0, 0]
        assert "states_rebuilt" not in client.faults.counts

    run(scenario)


def test_a_worker_that_hangs_is_killed_and_restarted(killed):
    async def scenario():
        async def fault(requests):
            if len(requests) > 1:
                await hang()

        worker = FakeWorker(fault)
        client = Client(worker, deadline_s=0.2)
        assert await client.all("ab") == dict.fromkeys("ab", scores(3))
        assert killed == [(worker, False)]
        assert client.faults.drain()[0].detail == {"reason": "TimeoutError", "steps": 2}

    run(scenario)


def test_a_batch_that_is_only_too_slow_is_scored_one_by_one(killed):
    async def scenario():
        async def fault(requests):
            await asyncio.sleep(0.02 * len(requests))

        client = Client(FakeWorker(fault), deadline_s=0.2)
        names = [f"r{index}" for index in range(12)]
        assert await client.all(names) == dict.fromkeys(names, scores(3))
        assert client.faults.counts == {"worker_restarts": 1}

    run(scenario)


def test_a_restart_is_waited_for():
    async def scenario():
        info_fault = raises(RayActorError(), OutOfMemoryError("again"), ActorUnschedulableError("no room"), None)
        worker = FakeWorker(raises(RayActorError(), None), info_fault)
        assert await Client(worker).all("ab") == dict.fromkeys("ab", scores(3))

    run(scenario)


@pytest.mark.parametrize(
    ("info_fault", "message"),
    [
        (hang, "did not come back within 0.2 s: RayActorError: The actor"),
        (
            raises(ActorUnschedulableError("no room")),
            "did not come back within 0.2 s: ActorUnschedulableError: .*no room",
        ),
        (raises(OSError("broken pipe")), "OSError: broken pipe"),
    ],
)
def test_a_worker_that_does_not_come_back_is_lost_to_all_that_wait(info_fault, message):
    async def scenario():
        worker, sound = FakeWorker(raises(RayActorError(), None), info_fault), FakeWorker()
        client = Client(worker, sound, deadline_s=0.2, requests=2)
        answers = await client.all([f"r{index}" for index in range(8)])
        lost = [name for name, answer in answers.items() if isinstance(answer, WorkerLost)]
        assert lost == ["r0", "r2", "r4", "r6"]  # in flight and pending; the other worker goes on
        for name in lost:
            with pytest.raises(WorkerLost, match=message):
                raise answers[name]
            assert "\n" not in str(answers[name])

    run(scenario)


def test_a_kill_that_fails_is_a_lost_worker(monkeypatch):
    def refuse(*_, **__):
        raise ValueError("no such actor")

    monkeypatch.setattr(pool_module.ray, "kill", refuse)

    async def scenario():
        answers = await Client(FakeWorker(hang), deadline_s=0.2).all("ab")
        assert [str(answer) for answer in answers.values()] == ["attribution failed: ValueError: no such actor"] * 2

    run(scenario)


@pytest.mark.parametrize(
    ("act", "cause"),
    [(raises(RayActorError()), "RayActorError: The actor"), (hang, "no answer within 0.2 s")],
)
def test_a_request_that_kills_its_worker_fails_alone(act, cause, killed):
    async def scenario():
        worker = FakeWorker(whenever("b", act))
        client = Client(worker, deadline_s=0.2)
        answers = await client.all("abcd")
        failed = answers.pop("b")
        assert type(failed) is RequestKillsWorker
        assert f"failed twice on this step alone, at last with {cause}" in str(failed)
        assert "\n" not in str(failed)
        assert answers == dict.fromkeys("acd", scores(3))
        assert worker.sent() == [["a", "b", "c", "d"], ["a"], ["b"], ["c"], ["d"], ["b"]]
        assert await client.all("acd", 4) == dict.fromkeys("acd", scores(4))
        assert worker.sent()[6:] == [["a", "c", "d"]]
        assert worker.restarts == 3
        assert client.faults.counts == {"worker_restarts": 3}

    run(scenario)


def test_failures_that_are_a_requests_do_not_count_against_the_worker():
    async def scenario():
        worker = FakeWorker(raises(*[RayActorError()] * 5, None))
        answers = await Client(worker, requests=2).all("abc")
        assert worker.sent() == [["a", "b"], ["a"], ["b"], ["a"], ["b"], ["c"]]
        assert [type(answer) for answer in answers.values()] == [RequestKillsWorker, RequestKillsWorker, list]

    run(scenario)


def test_a_worker_that_fails_five_times_in_a_row_is_lost():
    async def scenario():
        worker = FakeWorker(raises(*[RayActorError()] * 5, None))
        answers = await Client(worker).all("abcdef")
        assert {type(answer) for answer in answers.values()} == {WorkerLost}
        assert "failed 5 times in a row: RayActorError: The actor" in str(answers["a"])
        assert worker.sent() == [list("abcdef"), *map(list, "abcd")]

    run(scenario)


def test_failures_with_successes_in_between_do_not_add_up():
    async def scenario():
        worker = FakeWorker()
        client = Client(worker)
        for index in range(8):
            worker._fault = raises(RayActorError(), None)
            assert await client.score("a", 3 + index) == scores(3 + index)
        assert client.faults.counts == {"worker_restarts": 8}

    run(scenario)


@pytest.mark.parametrize("cause", [ValueError("region outside the tokens"), TimeoutError("of the scorer")])
def test_what_the_scorer_raises_fails_the_guilty_request_only(cause, killed):
    async def scenario():
        worker = FakeWorker(whenever("b", raises(raised_by_scorer(cause))))
        client = Client(worker)
        answers = await client.all("abc")
        assert isinstance(answers.pop("b"), type(cause))
        assert answers == dict.fromkeys("ac", scores(3))
        assert worker.sent() == [["a", "b", "c"], ["a"], ["b"], ["c"]]
        assert not client.faults.counts

    run(scenario)
    assert not killed


def test_a_worker_that_answers_too_little_fails_nobody_else():
    async def scenario():
        worker = FakeWorker()
        worker._extend = lambda request: [1.0]
        scored = worker._score

        async def short(requests, released):
            batch = await scored(requests, released)
            return ScoredBatch(batch.scores[1:], batch.begun, batch.seconds) if len(requests) > 1 else batch

        worker.score = Method(short)
        assert await Client(worker).all("ab") == {"a": [1.0], "b": [1.0]}

    run(scenario)


@pytest.mark.parametrize("alone", [False, True])
def test_a_cancelled_row_is_not_sent(alone):
    async def scenario():
        under_way, go_on = asyncio.Event(), asyncio.Event()

        async def fault(requests):
            under_way.set()
            await go_on.wait()
            if alone and len(requests) == 3:
                raise raised_by_scorer(ValueError("one of them"))

        worker = FakeWorker(fault)
        client = Client(worker)
        tasks = {name: asyncio.create_task(client.score(name)) for name in ("abc" if alone else "a")}
        await under_way.wait()
        tasks |= {name: asyncio.create_task(client.score(name)) for name in ("" if alone else "bc")}
        await asyncio.sleep(0)
        tasks["b"].cancel()
        go_on.set()
        answers = await asyncio.gather(*tasks.values(), return_exceptions=True)
        assert [type(answer) for answer in answers] == [list, asyncio.CancelledError, list]
        assert worker.sent() == ([["a", "b", "c"], ["a"], ["c"]] if alone else [["a"], ["c"]])

    run(scenario)


def test_calls_are_traced():
    async def scenario():
        client = Client(FakeWorker(), traced=True)
        await client.all("ab")
        call, score = client.tracer.drain()
        assert (call.track, call.args) == ("calls to worker 0", {"steps": 2})
        assert (score.track, score.args) == ("worker 0", {"steps": 2, "tokens": 6})

    run(scenario)


# Prompts ahead of need


def test_prompts_are_computed_ahead_when_nothing_else_waits_and_their_first_step_sends_nothing_twice():
    worker = FakeWorker()
    client = Client(worker)

    async def scenario():
        client.pool.prefill("a", [0, 1, 2], ROI)
        client.pool.prefill("b", [0, 1, 2], ROI)
        assert await client.score("c") == scores(3)
        while len(worker.batches) < 2:
            await asyncio.sleep(0)
        assert worker.sent() == [["c"], ["a", "b"]]
        assert await client.score("a", 5) == scores(5)
        assert [(request.start, request.token_ids) for request in worker.batches[-1]] == [(3, [3, 4])]

    run(scenario)


def test_a_prompt_whose_step_comes_first_or_whose_row_has_ended_is_not_computed_ahead():
    worker = FakeWorker()
    client = Client(worker)

    async def scenario():
        for name in ("stepped", "ended", "left"):
            client.pool.prefill(name, [0, 1, 2], ROI)
        client.pool.release("ended")
        await client.score("stepped", 4)
        while len(worker.batches) < 2:
            await asyncio.sleep(0)
        assert worker.sent() == [["stepped"], ["left"]]

    run(scenario)


def test_no_prompt_is_computed_ahead_where_most_rows_are_never_scored():
    worker = FakeWorker()
    client = Client(worker)

    async def scenario():
        for name in ("a", "b"):
            client.pool.release(name)
        client.pool.prefill("c", [0, 1, 2], ROI)
        await client.score("d")
        await asyncio.sleep(0.01)
        assert worker.sent() == [["d"]]

    run(scenario)


def test_a_stateless_scorer_gets_no_prompts_ahead():
    worker = FakeWorker()
    client = Client(worker, stateful=False)

    async def scenario():
        client.pool.prefill("a", [0, 1, 2], ROI)
        await asyncio.sleep(0.01)
        assert not worker.batches

    run(scenario)


def test_a_prompt_that_fails_ahead_fails_with_its_first_step_and_no_other(caplog):
    worker = FakeWorker(whenever("bad", raises(ValueError("no such head"))))
    client = Client(worker)

    async def scenario():
        for name in ("bad", "good"):
            client.pool.prefill(name, [0, 1, 2], ROI)
        while len(worker.batches) < 1:
            await asyncio.sleep(0)
        answers = await client.all(["bad", "good"])
        assert isinstance(answers["bad"], ValueError) and answers["good"] == scores(3)

    run(scenario)
    assert not caplog.records


def test_a_prompt_ahead_that_kills_the_worker_is_not_held_against_it():
    """Its row's first step is blamed as any other is: the run goes on."""
    worker = FakeWorker(lambda requests: fault(requests))
    client = Client(worker)
    poison = {"p1", "p2", "p3", "p4", "p5", "p6"}

    async def fault(requests):
        if poison & {request.sequence for request in requests}:
            raise RayActorError()

    async def scenario():
        for name in sorted(poison):
            client.pool.prefill(name, [0, 1, 2], ROI)
            while worker.restarts < 1 + sorted(poison).index(name):
                await asyncio.sleep(0.01)
        assert await client.score("good") == scores(3)

    pool_module.RESTART_POLL_S, kept = 0.001, pool_module.RESTART_POLL_S
    try:
        run(scenario)
    finally:
        pool_module.RESTART_POLL_S = kept


def test_prompts_of_rows_that_ended_are_not_kept_while_the_worker_is_busy():
    busy = asyncio.Event()

    async def wait(requests):
        await busy.wait()

    worker = FakeWorker(wait)
    client = Client(worker)

    async def scenario():
        step = asyncio.create_task(client.score("busy"))
        await asyncio.sleep(0.01)
        for index in range(50):
            client.pool.prefill(f"{index}", [0, 1, 2], ROI)
            client.pool._scored.add(f"{index}")
            client.pool.release(f"{index}")
        assert not client.pool._lanes[0].ahead
        busy.set()
        await step

    run(scenario)


def test_a_name_that_is_used_again_does_not_meet_the_prompt_of_its_first_use():
    under_way, go_on = asyncio.Event(), asyncio.Event()

    async def wait(requests):
        under_way.set()
        await go_on.wait()

    worker = FakeWorker(wait)
    client = Client(worker)

    async def scenario():
        client.pool.prefill("a", [0] * 9, ROI)
        await under_way.wait()
        client.pool._scored.add("a")
        client.pool.release("a")
        step = asyncio.create_task(client.score("a", 5))
        await asyncio.sleep(0)
        go_on.set()
        assert await step == scores(5)
        assert [(request.start, len(request.token_ids)) for request in worker.batches[-1]] == [(0, 5)]
        assert worker.released[-1] == ["a"]

    run(scenario)
