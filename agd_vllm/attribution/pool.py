"""The client of the attribution workers: batches requests, keeps a sequence on its worker, outlives a worker."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError

from agd_vllm.faults import FaultLog
from agd_vllm.records import Gate, Roi, ScoreRequest
from agd_vllm.trace import Tracer

MAX_BATCH = 64
MAX_FAILURES_IN_A_ROW = 5
RESTART_POLL_S = 0.5


@dataclass(slots=True)
class _Pending:
    sequence: str
    token_ids: Sequence[int]
    roi: Roi
    candidate_ids: tuple[int, ...]
    scores: asyncio.Future


@dataclass(slots=True)
class _Lane:
    """One worker as seen from here. One batch is under way at a time: what arrives meanwhile is the next batch."""

    index: int
    worker: Any
    pending: deque[_Pending] = field(default_factory=deque)
    held: dict[str, int] = field(default_factory=dict)  # sequence -> tokens that the worker has seen
    released: list[str] = field(default_factory=list)
    failures: int = 0
    alone: int = 0  # requests to send one by one
    task: asyncio.Task | None = None


class WorkerLost(Exception):
    """An attribution worker failed too often in a row."""


class AttributionPool:
    """Scores gated steps on Ray actors of AttributionWorker.

    A sequence sticks to the worker that has the fewest sequences when it first comes. With a stateful scorer a
    request carries only the tokens since the last one; a worker that lost them is sent the whole sequence.
    """

    def __init__(self, workers: list[Any], stateful: bool, deadline_s: float, faults: FaultLog, tracer: Tracer):
        self._lanes = [_Lane(index, worker) for index, worker in enumerate(workers)]
        self._stateful = stateful
        self._deadline_s = deadline_s
        self._lane_of: dict[str, _Lane] = {}
        self._faults = faults
        self._tracer = tracer

    async def score(self, sequence: str, token_ids: Sequence[int], roi: Roi, gate: Gate) -> list[float]:
        """Scores of `gate.candidate_ids` after `token_ids` (prompt and output so far). Raises WorkerLost."""
        lane = self._lane_of.get(sequence)
        if lane is None:
            lane = self._lane_of[sequence] = min(self._lanes, key=lambda lane: len(lane.held))
            lane.held[sequence] = 0
        pending = _Pending(sequence, token_ids, roi, gate.candidate_ids, asyncio.get_running_loop().create_future())
        lane.pending.append(pending)
        if lane.task is None or lane.task.done():
            lane.task = asyncio.create_task(self._work_off(lane))
        return await pending.scores

    def release(self, sequence: str) -> None:
        """The row has ended: its worker may drop its state (told with the next batch)."""
        lane = self._lane_of.pop(sequence, None)
        if lane is not None and lane.held.pop(sequence) and self._stateful:
            lane.released.append(sequence)

    async def _work_off(self, lane: _Lane) -> None:
        while lane.pending:
            size = 1 if lane.alone else MAX_BATCH
            lane.alone = max(0, lane.alone - 1)
            batch = [lane.pending.popleft() for _ in range(min(size, len(lane.pending)))]
            batch = [pending for pending in batch if not pending.scores.done()]
            try:
                await self._score_batch(lane, batch)
                lane.failures = 0
            except (RayActorError, TimeoutError) as error:
                self._faults.record("worker_restarts", reason=type(error).__name__, steps=len(batch))
                lane.failures += 1
                lane.held = dict.fromkeys(lane.held, 0)
                try:
                    await self._revive(lane, error)
                except WorkerLost as lost:
                    self._fail([*batch, *lane.pending], lost)
                    lane.pending.clear()
                else:
                    lane.pending.extendleft(reversed(batch))
            except Exception as error:
                # One request may have failed for all: each is tried alone.
                for pending in batch:
                    lane.held[pending.sequence] = 0
                if len(batch) == 1:
                    self._fail(batch, error)
                else:
                    lane.alone = len(batch)
                    lane.pending.extendleft(reversed(batch))

    async def _revive(self, lane: _Lane, error: Exception) -> None:
        """Waits until Ray has restarted the actor, which loads the model anew and holds no sequence then."""
        if lane.failures >= MAX_FAILURES_IN_A_ROW:
            raise WorkerLost(f"an attribution worker failed {lane.failures} times in a row: {error}")
        if isinstance(error, TimeoutError):
            ray.kill(lane.worker, no_restart=False)
        deadline = time.monotonic() + self._deadline_s
        while True:
            await asyncio.sleep(RESTART_POLL_S)
            try:
                await lane.worker.info.remote()
                return
            except RayActorError as restarting:
                if time.monotonic() > deadline:
                    raise WorkerLost(f"an attribution worker did not come back: {restarting}") from restarting

    @staticmethod
    def _fail(batch: list[_Pending], error: Exception) -> None:
        for pending in batch:
            if not pending.scores.done():
                pending.scores.set_exception(error)

    async def _score_batch(self, lane: _Lane, batch: list[_Pending]) -> None:
        requests = [self._request(lane, pending) for pending in batch]
        released, lane.released = lane.released, []
        begun = time.time()
        async with asyncio.timeout(self._deadline_s):
            scored = await lane.worker.score.remote(requests, released)
        steps, tokens = len(batch), sum(len(request.token_ids) for request in requests)
        self._tracer.add(f"calls to worker {lane.index}", "call", begun, time.time() - begun, steps=steps)
        self._tracer.add(f"worker {lane.index}", "score", scored.begun, scored.seconds, steps=steps, tokens=tokens)
        for pending, scores in zip(batch, scored.scores, strict=True):
            if scores is None:
                lane.held[pending.sequence] = 0
                self._faults.record("states_rebuilt", row=pending.sequence)
                lane.pending.append(pending)
            elif not pending.scores.done():
                if self._stateful and pending.sequence in lane.held:
                    lane.held[pending.sequence] = len(pending.token_ids)
                pending.scores.set_result(scores)

    def _request(self, lane: _Lane, pending: _Pending) -> ScoreRequest:
        start = lane.held.get(pending.sequence, 0)
        return ScoreRequest(
            pending.sequence, start, list(pending.token_ids[start:]), pending.roi, pending.candidate_ids
        )
