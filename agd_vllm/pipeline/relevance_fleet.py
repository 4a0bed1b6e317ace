"""Attribution workers that run in reverse mode: a row at a time each, replaced when they die."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayTaskError

from agd_vllm.attribution.worker import AttributionSettings, WorkerRelevance
from agd_vllm.faults import last_line
from agd_vllm.models.inspect import ModelInfo
from agd_vllm.pipeline import placement
from agd_vllm.pipeline.actors import kill, loaded
from agd_vllm.pipeline.teams import Demand

TURN_S = 1.0
# A row with which a worker has died so often does not get another one.
TRIES = 2
MAX_DEATHS_IN_A_ROW = 5

log = logging.getLogger("agd_vllm")


@dataclass(slots=True)
class Task:
    """The part of a row that is left to do: `targets` are (step, token id) of its answer."""

    id: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    targets: list[tuple[int, int]]
    deaths: int = 0


@dataclass(frozen=True, slots=True)
class Attributed:
    """A task that has ended: the relevance of its targets, in their order, or `fault`, (type, message)."""

    task: Task
    relevances: list[WorkerRelevance] = field(default_factory=list)
    fault: tuple[str, str] | None = None


class RelevanceFleet:
    """`count` workers, each in a process of its own, because lxt patches classes of a whole process.

    Use as a context; starts Ray where none runs. Raises RuntimeError where a worker cannot start, or where workers die
    MAX_DEATHS_IN_A_ROW times with no row attributed in between.
    """

    def __init__(self, model: ModelInfo, settings: AttributionSettings, count: int, debug: bool):
        self._model = model
        self._settings = settings
        self._debug = debug
        self._cluster = placement.connect(Demand(engines=0, workers=count, gpus_per_engine=0), debug)
        _, self._cores = placement.cores(self._cluster, 0, count)
        self.layout = placement.layout(self._cluster.shares, [], self._cores)
        self._workers: list[Any] = []
        self._deaths = 0

    def __enter__(self) -> RelevanceFleet:
        try:
            self._workers = [self._launch(index) for index in range(len(self._cores))]
            loaded([worker.info.remote() for worker in self._workers], "an attribution worker")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            kill(worker)
        placement.disconnect(self._cluster)

    def _launch(self, index: int) -> Any:
        settings = replace(self._settings, cores=self._cores[index])
        return placement.make_worker(self._cluster, index, self._model, settings, self._debug)

    def attribute(self, tasks: Iterator[Task]) -> Iterator[Attributed | None]:
        """Every task exactly once, in completion order; None now and then while nothing ends."""
        again: deque[Task] = deque()
        running: dict[Any, tuple[int, Task]] = {}
        while True:
            busy = {index for index, _ in running.values()}
            for index in set(range(len(self._workers))) - busy:
                task = next(itertools.chain(_drain(again), tasks), None)
                if task is not None:
                    running[self._send(index, task)] = (index, task)
            if not running:
                return
            ready, _ = ray.wait(list(running), num_returns=1, timeout=TURN_S)
            for call in ready:
                yield from self._answer(call, *running.pop(call), again)
            yield None

    def _send(self, index: int, task: Task) -> Any:
        prompt = len(task.prompt_token_ids)
        last = max(step for step, _ in task.targets)
        # The token at position p predicts the next one: the first output token has the prompt's last for its position.
        targets = [(prompt + step - 1, token) for step, token in task.targets]
        return self._workers[index].relevance.remote(task.prompt_token_ids + task.token_ids[:last], targets)

    def _answer(self, call: Any, index: int, task: Task, again: deque[Task]) -> Iterator[Attributed]:
        try:
            relevances = ray.get(call)
        except RayTaskError as error:
            yield Attributed(task, fault=("attribution", last_line(error)))
        except Exception as error:  # all else that Ray reports is about the worker or its machine
            yield from self._replace(index, task, error, again)
        else:
            self._deaths = 0
            yield Attributed(task, relevances)

    def _replace(self, index: int, task: Task, error: Exception, again: deque[Task]) -> Iterator[Attributed]:
        reason = str(error).strip().splitlines()[0]
        self._deaths += 1
        if self._deaths >= MAX_DEATHS_IN_A_ROW:
            raise RuntimeError(
                f"an attribution worker died {self._deaths} times in a row: {reason}; what was attributed is kept, and "
                "the same command resumes from there"
            ) from error
        log.warning("an attribution worker died with row %s and is replaced: %s", task.id, reason)
        kill(self._workers[index])
        self._workers[index] = self._launch(index)
        task.deaths += 1
        if task.deaths < TRIES:
            again.append(task)
        else:
            yield Attributed(task, fault=("poison", f"the worker died whenever it attributed this row: {reason}"))


def _drain(tasks: deque[Task]) -> Iterator[Task]:
    while tasks:
        yield tasks.popleft()
