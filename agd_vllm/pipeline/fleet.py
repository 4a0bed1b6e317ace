"""The engines of a run: hands them rows as they have room, collects what has ended, replaces an engine that died."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError

from agd_vllm.attribution.pool import WorkerLost
from agd_vllm.faults import FaultLog
from agd_vllm.pipeline.replica import EngineLost, ReplicaInfo, RowFailed
from agd_vllm.pipeline.source import Source
from agd_vllm.records import DecodedRow, PreparedRow, RowError
from agd_vllm.trace import TraceFile

# An engine answers `collect` after this many seconds at the latest; one that says nothing for the other is dead.
COLLECT_WAIT_S, SILENCE_S = 0.5, 120.0
# Rows handed to an engine beyond its sessions, so that a slot never waits for the driver.
ROWS_AHEAD = 32
MAX_RESTARTS_IN_A_ROW = 5
# A row that was alone in an engine when it died, this many times, killed it.
POISON_DEATHS = 2

log = logging.getLogger("agd_vllm")


@dataclass(slots=True, eq=False)
class _Engine:
    index: int
    actor: Any
    rows: dict[str, PreparedRow] = field(default_factory=dict)
    # In flight when the engine died: decoded again one at a time, so that the one that kills it is found.
    suspects: deque[PreparedRow] = field(default_factory=deque)
    call: Any = None
    called: float = 0.0
    started: bool = False
    waiting: int = 0
    idle_seconds: float = 0.0


class Fleet:
    """Starts `count` engines by `make` (index to an actor of Replica) and tells each by `attach` who scores for it.

    Raises RuntimeError where one cannot start, or dies MAX_RESTARTS_IN_A_ROW times with no row decoded in between.
    """

    def __init__(
        self,
        make: Callable[[int], Any],
        attach: Callable[[Any], None],
        count: int,
        faults: FaultLog,
        trace: TraceFile | None = None,
    ):
        self._make = make
        self._attach = attach
        self._engines = [_Engine(index, make(index)) for index in range(count)]
        self._restarts_in_a_row = 0
        self._idle_before = 0.0
        self._alone_deaths: Counter[str] = Counter()
        self._faults = faults
        self._trace = trace

    def start(self) -> ReplicaInfo:
        """Waits until all engines have loaded the model."""
        try:
            infos = ray.get([engine.actor.start.remote() for engine in self._engines])
        except Exception as error:
            raise RuntimeError(f"an engine could not start: {last_line(error)} (--debug shows vLLM's log)") from error
        for engine in self._engines:
            self._attach(engine.actor)
            engine.started = True
        self._window = infos[0].max_sessions + ROWS_AHEAD
        return infos[0]

    def decode(self, source: Source) -> Iterator[DecodedRow | RowError | None]:
        """Every row of `source` exactly once, in completion order; None now and then while nothing ends."""
        while True:
            for engine in sorted(self._engines, key=lambda engine: len(engine.rows)):
                self._fill(engine, source)
            yield from source.refused()
            calls = {engine.call: engine for engine in self._engines if engine.call is not None}
            if not calls:
                if source.exhausted:
                    return
                continue
            done, _ = ray.wait(list(calls), num_returns=1, timeout=SILENCE_S)
            for call in done:
                yield from self._answer(calls[call], source)
            for engine in self._engines:
                if engine.started and engine.call is not None and time.monotonic() - engine.called > SILENCE_S:
                    yield from self._replace(engine, source, TimeoutError(f"no answer for {SILENCE_S:g} s"))
            yield None

    def _fill(self, engine: _Engine, source: Source) -> None:
        if not engine.started:
            return
        if engine.suspects:
            rows = [] if engine.rows else [engine.suspects.popleft()]
        else:
            rows = source.take(self._window - len(engine.rows))
        if rows:
            engine.actor.submit.remote(rows)
            engine.rows |= {row.id: row for row in rows}
        if engine.rows and engine.call is None:
            engine.call = engine.actor.collect.remote(COLLECT_WAIT_S)
            engine.called = time.monotonic()

    def _answer(self, engine: _Engine, source: Source) -> Iterator[DecodedRow | RowError]:
        call, engine.call = engine.call, None
        try:
            answer = ray.get(call)
        except WorkerLost as lost:
            raise RuntimeError(f"{last_line(lost)}; what was decoded is kept, the same command goes on there") from lost
        except Exception as error:
            # While an engine starts, vLLM may fail in any way; later on anything but its death is our own mistake.
            if engine.started and not isinstance(error, RayActorError | EngineLost):
                raise
            yield from self._replace(engine, source, error)
            return
        if not engine.started:
            self._attach(engine.actor)
            engine.started = True
            return
        ended, progress = answer
        engine.waiting = progress.waiting_for_attribution
        engine.idle_seconds = progress.idle_seconds
        if self._trace is not None:
            self._trace.write(f"engine {engine.index}", progress.spans)
        self._faults.absorb(progress.faults)
        if ended:
            self._restarts_in_a_row = 0
        for row in ended:
            del engine.rows[row.id]
            self._alone_deaths.pop(row.id, None)
            yield source.outcome(row)

    def _replace(self, engine: _Engine, source: Source, error: Exception) -> Iterator[RowError]:
        """A new engine in the place of a dead one. Its rows are decoded again, from the start and one at a time."""
        reason = last_line(error)
        self._faults.record("engine_restarts", reason=reason, rows=len(engine.rows))
        self._restarts_in_a_row += 1
        log.warning("an engine died with %d rows in flight and is replaced: %s", len(engine.rows), reason)
        if self._restarts_in_a_row > MAX_RESTARTS_IN_A_ROW:
            raise RuntimeError(
                f"the engine died {self._restarts_in_a_row} times in a row, the last time: {reason}; what was decoded "
                "is kept, and the same command goes on from there"
            )
        kill(engine.actor)
        engine.waiting = 0
        self._idle_before += engine.idle_seconds
        engine.idle_seconds = 0.0
        rows, engine.rows = list(engine.rows.values()), {}
        if len(rows) == 1 and self._is_poison(rows[0]):
            yield source.outcome(
                RowFailed(rows[0].id, "poison", f"the engine died whenever it decoded this row: {reason}")
            )
        else:
            engine.suspects.extendleft(reversed(rows))
        engine.actor, engine.started = self._make(engine.index), False
        engine.call = engine.actor.start.remote()

    def _is_poison(self, row: PreparedRow) -> bool:
        self._alone_deaths[row.id] += 1
        return self._alone_deaths[row.id] >= POISON_DEATHS

    @property
    def waiting_for_attribution(self) -> int:
        """Rows that wait for scores, as last heard."""
        return sum(engine.waiting for engine in self._engines)

    @property
    def idle_seconds(self) -> float:
        """Seconds in which an engine had rows and nothing to run, over all engines, as last heard."""
        return self._idle_before + sum(engine.idle_seconds for engine in self._engines)

    def close(self) -> None:
        for engine in self._engines:
            try:
                ray.get(engine.actor.stop.remote(), timeout=30)
            except Exception as error:
                log.debug("an engine did not stop by itself: %s", error)
            kill(engine.actor)
        self._engines = []


def kill(actor: Any) -> None:
    """Ends an actor that may be dead already."""
    try:
        ray.kill(actor)
    except Exception as error:
        log.debug("could not kill an actor: %s", error)


def last_line(error: Exception) -> str:
    """The last words of an error, which may hold a remote traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
