"""The client of the attribution workers: batches requests, keeps a sequence on its worker, outlives a worker."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from agd_vllm.attribution.batch_bounds import BatchBounds
from agd_vllm.faults import FaultLog
from agd_vllm.low_memory import killed_for_memory
from agd_vllm.records import Gate, Roi, ScoreRequest
from agd_vllm.trace import Tracer

MAX_FAILURES_IN_A_ROW = 5
RESTART_POLL_S = 0.5


@dataclass(slots=True)
class _Pending:
    sequence: str
    token_ids: Sequence[int]
    roi: Roi
    candidate_ids: tuple[int, ...]
    scores: asyncio.Future
    failed_alone: bool = False  # the worker failed while it had this request only
    sent: bool = False  # of a prompt ahead of need: it is under way


@dataclass(slots=True)
class _Lane:
    """One worker as seen from here. One batch is under way at a time: what arrives meanwhile is the next batch."""

    index: int
    worker: Any
    bounds: BatchBounds
    pending: deque[_Pending] = field(default_factory=deque)
    alone: deque[_Pending] = field(default_factory=deque)  # from failed batches: sent one by one, before `pending`
    ahead: dict[str, _Pending] = field(default_factory=dict)  # prompts that nobody waits for yet: sent after all else
    held: dict[str, int] = field(default_factory=dict)  # sequence -> tokens that the worker has seen
    released: list[str] = field(default_factory=list)
    failures: int = 0  # of the worker, since it last scored a batch
    task: asyncio.Task | None = None

    def next_batch(self) -> list[_Pending]:
        """One request that has to go alone, else as many as the bounds allow and at least one; empty: nothing waits."""
        return self._take(self.alone, 1) or self._take(self.pending, self.bounds.requests) or self._take_ahead()

    def _take(self, queue: deque[_Pending], size: int) -> list[_Pending]:
        batch: list[_Pending] = []
        tokens = 0
        while queue and len(batch) < size:
            if not queue[0].scores.done():  # else its row was cancelled, or has failed
                tokens += len(queue[0].token_ids) - self.held.get(queue[0].sequence, 0)
                if batch and tokens > self.bounds.tokens:
                    break
                batch.append(queue[0])
            queue.popleft()
        return batch

    def _take_ahead(self) -> list[_Pending]:
        batch: list[_Pending] = []
        tokens = 0
        for pending in self.ahead.values():
            tokens += len(pending.token_ids)
            if batch and (tokens > self.bounds.ahead or len(batch) == self.bounds.requests):
                break
            pending.sent = True
            batch.append(pending)
        return batch

    def drop_ahead(self, sequence: str) -> None:
        """Its first step brings the prompt along, or its row has ended: what is under way is not heeded."""
        pending = self.ahead.pop(sequence, None)
        if pending is not None:
            pending.scores.cancel()

    def forget(self, sequences: Iterable[str]) -> None:
        """The worker may not hold them any more. One that was released meanwhile stays out of `held`."""
        self.held |= dict.fromkeys(self.held.keys() & set(sequences), 0)


class WorkerLost(Exception):
    """An attribution worker failed too often in a row, or did not come back."""


class RequestKillsWorker(Exception):
    """The attribution worker failed twice while it scored this request and no other."""


class AttributionPool:
    """Scores gated steps on Ray actors of AttributionWorker.

    A sequence sticks to the worker that has the fewest sequences when it first comes. With a stateful scorer a
    request carries only the tokens since the last one; a worker that lost them is sent the whole sequence.

    When a batch raises, its requests are tried again one at a time, and one that raises alone fails with that error.
    When the worker fails (it died, or did not answer before the deadline and is killed), Ray restarts it, and they
    are tried one at a time, too. A request that is alone in a failure for the second time gets RequestKillsWorker and
    nothing else is harmed. All other failures count against the worker: after MAX_FAILURES_IN_A_ROW without a scored
    batch in between, or when the restart takes longer than the deadline, all that wait for it get WorkerLost.
    """

    def __init__(
        self,
        workers: list[Any],
        stateful: bool,
        deadline_s: float,
        faults: FaultLog,
        tracer: Tracer,
        bounds: BatchBounds,
    ):
        self._lanes = [_Lane(index, worker, bounds) for index, worker in enumerate(workers)]
        self._stateful = stateful
        self._deadline_s = deadline_s
        self._lane_of: dict[str, _Lane] = {}
        self._scored: set[str] = set()
        self._ended = self._ended_scored = 0
        self._faults = faults
        self._tracer = tracer

    async def score(self, sequence: str, token_ids: Sequence[int], roi: Roi, gate: Gate) -> list[float]:
        """Scores of `gate.candidate_ids` after `token_ids` (prompt and output so far).

        Raises WorkerLost, RequestKillsWorker, and what the scorer raises for this request.
        """
        self._scored.add(sequence)
        lane = self._lane(sequence)
        prompt = lane.ahead.get(sequence)
        if prompt is not None and not prompt.sent:
            lane.drop_ahead(sequence)
        pending = _Pending(sequence, token_ids, roi, gate.candidate_ids, asyncio.get_running_loop().create_future())
        lane.pending.append(pending)
        self._wake(lane)
        return await pending.scores

    def prefill(self, sequence: str, token_ids: Sequence[int], roi: Roi) -> None:
        """Has the prompt `token_ids` computed while vLLM computes it too, as far as the worker has nothing else to do.

        Nobody waits for it, and nothing comes of its failure: the row's first step finds what is wrong, and says so.
        Not done where most of the rows that have ended were never scored.
        """
        if self._stateful and 2 * self._ended_scored >= self._ended:
            lane = self._lane(sequence)
            if lane.held[sequence] == 0:
                lane.ahead[sequence] = _Pending(
                    sequence, token_ids, roi, (), asyncio.get_running_loop().create_future()
                )
                self._wake(lane)

    def _lane(self, sequence: str) -> _Lane:
        lane = self._lane_of.get(sequence)
        if lane is None:
            lane = self._lane_of[sequence] = min(self._lanes, key=lambda lane: len(lane.held))
            lane.held[sequence] = 0
        return lane

    def _wake(self, lane: _Lane) -> None:
        if lane.task is None or lane.task.done():
            lane.task = asyncio.create_task(self._work_off(lane))

    def release(self, sequence: str) -> None:
        """The row has ended: its worker may drop its state (told with the next batch)."""
        self._ended += 1
        if sequence in self._scored:
            self._scored.remove(sequence)
            self._ended_scored += 1
        lane = self._lane_of.pop(sequence, None)
        if lane is None:
            return
        del lane.held[sequence]
        lane.drop_ahead(sequence)
        # Told even where nothing is known to be held: the first request may be under way.
        if self._stateful:
            lane.released.append(sequence)

    async def _work_off(self, lane: _Lane) -> None:
        batch: list[_Pending] = []
        try:
            while batch := lane.next_batch():
                try:
                    await self._score_batch(lane, batch)
                    lane.failures = 0
                except Exception as error:
                    if _worker_failed(error):
                        self._faults.record("worker_restarts", reason=type(error).__name__, steps=len(batch))
                        lane.forget(lane.held)
                        if not batch[0].sent:
                            self._blame(lane, batch, error)
                        await self._revive(lane, error)
                    elif not batch[0].sent:
                        self._isolate(lane, batch, error)
                for pending in batch:
                    if pending.sent and lane.ahead.get(pending.sequence) is pending:
                        del lane.ahead[pending.sequence]
        except Exception as error:
            # Whatever it was: nobody may wait for ever. What is answered leaves the queues with the next batch.
            lost = error if isinstance(error, WorkerLost) else WorkerLost(f"attribution failed: {self._cause(error)}")
            self._fail([*batch, *lane.alone, *lane.pending], lost)

    async def _score_batch(self, lane: _Lane, batch: list[_Pending]) -> None:
        requests = [self._request(lane, pending) for pending in batch]
        # Not told again if the batch fails: the worker drops them before it scores, and a new one holds nothing.
        released, lane.released = lane.released, []
        begun = time.time()
        async with asyncio.timeout(self._deadline_s):
            scored = await lane.worker.score.remote(requests, released)
        kind, steps = ("prefill", 0) if batch[0].sent else ("score", len(batch))
        tokens = sum(len(request.token_ids) for request in requests)
        self._tracer.add(f"calls to worker {lane.index}", "call", begun, time.time() - begun, steps=steps)
        self._tracer.add(f"worker {lane.index}", kind, scored.begun, scored.seconds, steps=steps, tokens=tokens)
        for pending, scores in zip(batch, scored.scores, strict=True):
            if pending.scores.done():
                continue
            if scores is None:
                lane.forget([pending.sequence])
                self._faults.record("states_rebuilt", row=pending.sequence)
                lane.pending.append(pending)
            else:
                if self._stateful and pending.sequence in lane.held:
                    lane.held[pending.sequence] = len(pending.token_ids)
                pending.scores.set_result(scores)

    def _request(self, lane: _Lane, pending: _Pending) -> ScoreRequest:
        start = lane.held.get(pending.sequence, 0)
        return ScoreRequest(
            pending.sequence, start, list(pending.token_ids[start:]), pending.roi, pending.candidate_ids
        )

    def _isolate(self, lane: _Lane, batch: list[_Pending], error: Exception) -> None:
        """The scorer raised: one request may have failed for all, so each is tried alone, and fails if it is."""
        lane.forget(pending.sequence for pending in batch)
        if len(batch) == 1:
            self._fail(batch, error)
        else:
            lane.alone.extend(batch)

    def _blame(self, lane: _Lane, batch: list[_Pending], error: Exception) -> None:
        """The worker failed: because of a request that was alone twice, else by itself. Raises WorkerLost."""
        if len(batch) == 1:
            if batch[0].failed_alone:
                message = f"the attribution worker failed twice on this step alone, at last with {self._cause(error)}"
                self._fail(batch, RequestKillsWorker(message))
                return
            batch[0].failed_alone = True
        lane.failures += 1
        if lane.failures >= MAX_FAILURES_IN_A_ROW:
            raise WorkerLost(f"an attribution worker failed {lane.failures} times in a row: {self._cause(error)}")
        # At the end: where others are scored first, the worker is not to blame.
        lane.alone.extend(batch)

    async def _revive(self, lane: _Lane, error: Exception) -> None:
        """Waits until Ray has restarted the actor, which loads the model anew and holds no sequence then."""
        if isinstance(error, TimeoutError):
            ray.kill(lane.worker, no_restart=False)
        try:
            async with asyncio.timeout(self._deadline_s):
                while True:
                    await asyncio.sleep(RESTART_POLL_S)
                    try:
                        await lane.worker.info.remote()
                        return
                    except RayError as not_yet:
                        error = not_yet
        except TimeoutError:
            message = f"an attribution worker did not come back within {self._deadline_s:g} s: {self._cause(error)}"
            raise WorkerLost(message) from error

    def _cause(self, error: Exception) -> str:
        """In one line; Ray's messages have many."""
        if isinstance(error, TimeoutError) and not isinstance(error, RayError):
            return f"no answer within {self._deadline_s:g} s"
        return killed_for_memory(str(error)) or f"{type(error).__name__}: {error}".strip().splitlines()[0]

    @staticmethod
    def _fail(batch: Iterable[_Pending], error: Exception) -> None:
        for pending in batch:
            if not pending.scores.done():
                pending.scores.set_exception(error)


def _worker_failed(error: Exception) -> bool:
    """Did the worker die or hang? Ray says so with many types; what the scorer raised comes as a RayTaskError."""
    return isinstance(error, RayError | TimeoutError) and not isinstance(error, RayTaskError)
