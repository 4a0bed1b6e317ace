"""The engines of a run: hands them rows as they have room, collects what has ended, replaces an engine that died."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from agd_vllm.attribution.pool import WorkerLost
from agd_vllm.faults import FaultLog, last_line
from agd_vllm.pipeline.actors import START_S, kill, loaded
from agd_vllm.pipeline.deaths import KEPT, Deaths
from agd_vllm.pipeline.replica import EngineLost, Progress, ReplicaInfo, RowFailed
from agd_vllm.pipeline.source import Source
from agd_vllm.pipeline.suspects import Suspects
from agd_vllm.records import DecodedRow, PreparedRow, RowError
from agd_vllm.trace import TraceFile

# An engine answers `collect` after this many seconds at the latest; one that says nothing for the other is dead.
COLLECT_WAIT_S, SILENCE_S = 0.5, 120.0
# All engines together, before they are killed.
STOP_S = 30.0
# The driver waits for answers this long at a time; its caller has something else to do, too.
TURN_S = 1.0
# Rows handed to an engine beyond its sessions, so that a slot never waits for the driver.
ROWS_AHEAD = 32
# Rows handed to an engine at a time: the first ones decode while the next are read and prepared.
ROWS_PER_TURN = 8

log = logging.getLogger("agd_vllm")


@dataclass(slots=True, eq=False)
class _Engine:
    """`call` is the one call that an answer is due to, made at `called`: `start` at first, `collect` later on."""

    index: int
    actor: Any
    call: Any
    called: float
    started: bool = False
    rows: dict[str, PreparedRow] = field(default_factory=dict)
    # Its rows are suspects, to which no others are added.
    alone: bool = False
    # Calls of a decode() that was left: until they have ended they may take rows out of the engine.
    left: list[Any] = field(default_factory=list)
    waiting: int = 0
    idle_seconds: float = 0.0


class Fleet:
    """Starts `count` engines by `make` (index to an actor of Replica); `attach` (index, actor) tells each who scores.

    `one_by_one`: engines that load at once would take each other's memory for their own.
    Raises RuntimeError where one cannot start, or where they die too often (see Deaths).
    """

    def __init__(
        self,
        make: Callable[[int], Any],
        attach: Callable[[int, Any], None],
        count: int,
        faults: FaultLog,
        trace: TraceFile | None = None,
        one_by_one: bool = False,
    ):
        self._make = make
        self._attach = attach
        self._count = count
        self._one_by_one = one_by_one
        self._engines: list[_Engine] = []
        self._suspects = Suspects()
        self._decoding = False
        self._batch = 0
        self._deaths = Deaths()
        self._idle_before = 0.0
        self._faults = faults
        self._trace = trace

    def _launch(self, index: int) -> _Engine:
        actor = self._make(index)
        return _Engine(index, actor, actor.start.remote(), time.monotonic())

    def start(self) -> ReplicaInfo:
        """Waits until all engines have loaded the model."""
        infos: list[ReplicaInfo] = []
        at_a_time = 1 if self._one_by_one else self._count
        for first in range(0, self._count, at_a_time):
            launched = [self._launch(index) for index in range(first, first + at_a_time)]
            self._engines += launched
            infos += loaded([engine.call for engine in launched], "an engine")
        for engine in self._engines:
            self._begin(engine)
            engine.call = None
        self._window = infos[0].max_sessions + ROWS_AHEAD
        return infos[0]

    def _begin(self, engine: _Engine) -> None:
        self._attach(engine.index, engine.actor)
        engine.started = True

    def serve(
        self,
        make: Callable[[int], Any],
        attach: Callable[[int, Any], None],
        tell: Callable[[Any], Any],
        faults: FaultLog,
    ) -> None:
        """Goes on for another run, whose `make` and `attach` are for engines in the place of dead ones; `tell` tells an
        engine's actor so, and gives the call. Raises RuntimeError where not every engine is there, or one does not
        answer."""
        if not all(engine.started for engine in self._engines):
            raise RuntimeError("an engine is loading")
        loaded([tell(engine.actor) for engine in self._engines], "an engine")
        self._make, self._attach, self._faults, self._deaths = make, attach, faults, Deaths()
        self._idle_before = -sum(engine.idle_seconds for engine in self._engines)

    def decode(self, source: Source) -> Iterator[DecodedRow | RowError | None]:
        """Every row of `source` exactly once, in completion order; None now and then while nothing ends.

        May be left early: the rows in flight are dropped, and the next decode() starts clean.
        """
        if self._decoding:
            raise RuntimeError("another decode() has not ended; read it to its end or close it before the next")
        self._decoding = True
        self._batch += 1
        try:
            self._settle(source)
            while not source.exhausted or self._suspects or any(engine.rows for engine in self._engines):
                if not self._engines:
                    raise RuntimeError("closed before a decode() had ended")
                for engine in sorted(self._engines, key=lambda engine: len(engine.rows)):
                    self._fill(engine, source)
                yield from source.refused()
                yield from self._collect(source)
                self._replace_silent(source)
                yield None
            yield from self._deaths.clear()
        finally:
            self._decoding = False
            self._forget()

    def _fill(self, engine: _Engine, source: Source) -> None:
        if not engine.started:
            return
        rows = self._next_rows(engine, source)
        if rows:
            engine.actor.submit.remote(rows, self._batch)
            engine.rows |= {row.id: row for row in rows}
        if engine.rows and engine.call is None:
            engine.call = engine.actor.collect.remote(COLLECT_WAIT_S)
            engine.called = time.monotonic()

    def _next_rows(self, engine: _Engine, source: Source) -> list[PreparedRow]:
        if not engine.rows:
            engine.alone = bool(self._suspects)
            if engine.alone:
                return self._suspects.take()
        return source.take(min(ROWS_PER_TURN, self._room(engine)))

    def _room(self, engine: _Engine) -> int:
        return self._window - len(engine.rows) if engine.started and not engine.alone else 0

    def _collect(self, source: Source) -> Iterator[DecodedRow | RowError]:
        """What the engines have answered; waits for the first answer unless there are rows to hand out meanwhile."""
        calls = {engine.call: engine for engine in self._engines if engine.call is not None}
        if not calls:
            return
        to_fill = not source.exhausted and any(self._room(engine) > 0 for engine in self._engines)
        ready, _ = ray.wait(list(calls), num_returns=1, timeout=0 if to_fill else TURN_S)
        if ready:
            ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        for call in ready:
            yield from self._answer(calls[call], source)

    def _answer(self, engine: _Engine, source: Source) -> Iterator[DecodedRow | RowError]:
        call, engine.call = engine.call, None
        try:
            answer = ray.get(call)
        except WorkerLost as lost:
            raise RuntimeError(f"{last_line(lost)}; {KEPT}") from lost
        except Exception as error:
            if not _is_death(engine, error):
                raise
            self._replace(engine, source, error)
            return
        if not engine.started:
            self._begin(engine)
            return
        ended, progress = answer
        self._heed(engine, progress)
        for row in ended:
            self._deaths.row_ended()
            del engine.rows[row.id]
            yield source.outcome(row)
        if ended:
            yield from self._deaths.clear()

    def _heed(self, engine: _Engine, progress: Progress) -> None:
        engine.waiting = progress.waiting_for_attribution
        engine.idle_seconds = progress.idle_seconds
        if self._trace is not None:
            self._trace.write(f"engine {engine.index}", progress.spans)
        self._faults.absorb(progress.faults)

    def _replace_silent(self, source: Source) -> None:
        for engine in self._engines:
            limit = SILENCE_S if engine.started else START_S
            if engine.call is None or time.monotonic() - engine.called <= limit:
                continue
            # The time may have passed here, with a slow caller. An answer from afar takes a moment to be fetched.
            answered, _ = ray.wait([engine.call], num_returns=1, timeout=TURN_S)
            if not answered:
                self._replace(engine, source, TimeoutError(f"no answer for {limit:g} s"))

    def _replace(self, engine: _Engine, source: Source, error: Exception) -> None:
        """A new engine in the place of a dead one. The rows that it held are suspects."""
        reason, rows = last_line(error), list(engine.rows.values())
        self._faults.record("engine_restarts", reason=reason, rows=len(rows))
        log.warning("an engine died with %d rows in flight and is replaced: %s", len(rows), reason)
        kill(engine.actor)
        self._idle_before += engine.idle_seconds
        self._engines[engine.index] = self._launch(engine.index)
        poison = self._suspects.add(rows)
        blamed = None
        if poison:
            message = f"the engine died whenever it decoded this row: {reason}"
            blamed = source.outcome(RowFailed(poison.id, "poison", message))
        self._deaths.add(reason, len(rows), blamed)

    def _forget(self) -> None:
        """Nothing of this decode() is left for the next: engines cancel what they hold, answers due are not heeded."""
        self._suspects.clear()
        self._deaths.forget()
        for engine in self._engines:
            if engine.rows:
                engine.left = [] if engine.call is None else [engine.call]
                engine.call, engine.rows, engine.waiting = None, {}, 0
                try:
                    engine.left.append(engine.actor.cancel.remote(self._batch))
                except Exception as error:
                    log.debug("could not cancel an engine's rows: %s", error)
                    kill(engine.actor)

    def _settle(self, source: Source) -> None:
        """Waits until engines are done with a decode() that was left; one that is not done in time is replaced."""
        deadline = time.monotonic() + SILENCE_S
        for engine in self._engines:
            if not engine.left:
                continue
            try:
                ray.get(engine.left, timeout=max(0.0, deadline - time.monotonic()))
            except Exception as error:
                self._replace(engine, source, error)
            else:
                engine.left = []

    @property
    def waiting_for_attribution(self) -> int:
        """Rows that wait for scores, as last heard."""
        return sum(engine.waiting for engine in self._engines)

    @property
    def idle_seconds(self) -> float:
        """Seconds in which an engine had rows and nothing to run, over all engines, as last heard."""
        return self._idle_before + sum(engine.idle_seconds for engine in self._engines)

    def close(self) -> None:
        """Asks engines to stop and kills them, at once where this is interrupted."""
        try:
            # An actor that loads a model hears nothing.
            stops = [engine.actor.stop.remote() for engine in self._engines if engine.started]
            if stops:
                _, late = ray.wait(stops, num_returns=len(stops), timeout=STOP_S)
                if late:
                    log.debug("%d engines did not stop by themselves", len(late))
        except Exception as error:
            log.debug("engines did not stop by themselves: %s", error)
        finally:
            engines, self._engines = self._engines, []
            for engine in engines:
                kill(engine.actor)


def _is_death(engine: _Engine, error: Exception) -> bool:
    """While an engine starts, vLLM may fail in any way; later on an error of its methods is our own mistake."""
    if not engine.started or isinstance(error, EngineLost):
        return True
    # All else that Ray reports is about the actor or its machine: dead, unreachable, out of memory.
    return isinstance(error, RayError) and not isinstance(error, RayTaskError)
