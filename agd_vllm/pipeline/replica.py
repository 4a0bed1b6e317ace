"""The Ray actor around one engine: takes rows, runs their loops side by side, hands back what has ended."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from agd_vllm.attribution.batch_bounds import BatchBounds
from agd_vllm.attribution.pool import AttributionPool, WorkerLost
from agd_vllm.engine.engine import Engine
from agd_vllm.engine.events import SessionFailed
from agd_vllm.engine.hold import Hold
from agd_vllm.engine.settings import EngineSettings, GateSettings
from agd_vllm.engine.stops import StopCheck
from agd_vllm.faults import Fault, FaultLog, last_line
from agd_vllm.models.inspect import ModelInfo
from agd_vllm.pipeline.signals import heard_by_children
from agd_vllm.prompts.tokenizer import load_tokenizer
from agd_vllm.records import DecodedRow, Gate, PreparedRow, Roi, RowRefused, Span
from agd_vllm.strategies.row_loop import decode_row
from agd_vllm.strategies.strategy import Strategy
from agd_vllm.trace import Span as TraceSpan
from agd_vllm.trace import Tracer

POOL_DEADLINE_S = 600.0
ENGINE_DEATH_S = 3.0
# Of the row that an engine begins with: its tokens, and those of an inline engine's prompt, which is its region, too.
FIRST_STEPS, FIRST_TOKENS = 2, 40


@dataclass(frozen=True, slots=True)
class RowFailed:
    """A row that could not be decoded; `type` and `message` as in errors.jsonl."""

    id: str
    type: str
    message: str


class EngineLost(Exception):
    """vLLM's engine is dead; the actor around it is of no use any more."""


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """What an engine reports once it has loaded: tokens of the longest sequence, rows side by side, seconds."""

    max_model_len: int
    max_sessions: int
    load_seconds: float


@dataclass(frozen=True, slots=True)
class Progress:
    """Rows that wait for scores now, the engine's idle seconds so far, faults and spans since the last time."""

    waiting_for_attribution: int
    idle_seconds: float
    faults: list[Fault]
    spans: list[TraceSpan]


class Replica:
    """A plain class; `placement` makes it an async Ray actor, whose calls may begin in any order.

    `after`: what Ray must have answered before the engine takes memory of its GPU.
    """

    def __init__(
        self,
        model: ModelInfo,
        engine: EngineSettings,
        strategy: Strategy,
        traced: bool,
        debug: bool,
        after: Sequence[Any] = (),
    ):
        self._model = model
        self._strategy = strategy
        self._tracer = Tracer(traced)
        self._seed = engine.seed
        self._engine = Engine(model, engine, self._tracer)
        self._after = after
        self._pool: AttributionPool | None = None
        self._attached = asyncio.Event()
        self._cancelled = 0
        self._ended: asyncio.Queue[DecodedRow | RowFailed] = asyncio.Queue()
        self._tasks: set[asyncio.Task] = set()
        self._faults = FaultLog()
        self._fatal: WorkerLost | None = None
        if not debug:
            logging.getLogger("vllm").setLevel(logging.ERROR)

    async def start(self) -> ReplicaInfo:
        """Loads the model and decodes two tokens; raises what vLLM raises, EngineLost where it fails at these."""
        begun = time.perf_counter()
        heard_by_children()  # vLLM ends its processes by signals
        self._tokenizer = load_tokenizer(
            self._model.path, revision=self._model.revision, trust_remote_code=self._model.trust_remote_code
        )
        hold = None
        if self._after:
            hold = Hold()
            # In a thread: while vLLM starts, this loop stands still.
            threading.Thread(target=_let_go, args=(hold, list(self._after)), daemon=True).start()
        self._engine.start(hold)
        await self._engine.steer(self._strategy.strength)
        await self._take_first_steps()
        return ReplicaInfo(self._engine.max_model_len, self._engine.max_sessions, time.perf_counter() - begun)

    async def _take_first_steps(self) -> None:
        """A model that vLLM loads and cannot run is found here: later on it would be the rows' fault. What inline
        attribution compiles when it is first used is compiled here, too, while no row waits."""
        try:
            if self._strategy.inline:
                tokens = min(FIRST_TOKENS, self._engine.max_model_len - FIRST_STEPS)
                row = PreparedRow("first steps", [0] * tokens, Roi((Span(0, tokens),)), max_tokens=FIRST_STEPS)
                eos_ids: frozenset[int] = frozenset()
                await decode_row(self._engine, None, row, self._tokenizer, eos_ids, self._faults, self._strategy)
                return
            row = PreparedRow("first steps", [0], Roi(), max_tokens=FIRST_STEPS)
            stops = StopCheck(row, frozenset(), self._tokenizer)
            gate = None if self._model.pause_id is None else GateSettings()
            async with self._engine.session(row, stops, gate) as session:
                event = await session.next()
                while isinstance(event, Gate):
                    event = session.select(event.candidate_ids[0]) or await session.next()
        except Exception as error:
            if await self._engine.dies(ENGINE_DEATH_S):
                raise EngineLost(f"at its first steps {self._engine.cause_of_death}") from error
            raise

    async def serve(self, strategy: Strategy) -> None:
        """Takes another strategy, whose rows come from now on."""
        self._strategy = strategy
        await self._engine.steer_anew(strategy.strength)

    async def attach(self, workers: list[Any], stateful: bool, cache_tokens: int | None, bounds: BatchBounds) -> None:
        """Names the attribution workers, which rows wait for; with none of them no row is guided by attribution.

        `cache_tokens`: what the workers hold for this engine's rows; more rows side by side would evict each other.
        `bounds`: of what they are sent at once.
        """
        from agd_vllm.attribution.block_pool import BLOCK_TOKENS

        try:
            if workers:
                self._engine.limit_attribution(cache_tokens, BLOCK_TOKENS)
                self._pool = AttributionPool(workers, stateful, POOL_DEADLINE_S, self._faults, self._tracer, bounds)
        except Exception as error:
            # Nobody asks what became of this call, and rows wait for it.
            self._fatal = WorkerLost(f"an engine could not be told its attribution workers: {last_line(error)}")
            return
        self._attached.set()

    async def submit(self, rows: list[PreparedRow], batch: int) -> None:
        """Decodes `rows`, which belong to the batch of that number; not if it has been cancelled meanwhile."""
        if batch <= self._cancelled:
            return
        for row in rows:
            task = asyncio.create_task(self._decode(row))
            # The loop keeps only weak references to tasks.
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _decode(self, row: PreparedRow) -> None:
        try:
            async with asyncio.timeout(POOL_DEADLINE_S):
                await self._attached.wait()
        except TimeoutError:
            self._fatal = WorkerLost(f"an engine was not told its attribution workers within {POOL_DEADLINE_S:g} s")
            return
        try:
            ended = await decode_row(
                self._engine,
                self._pool,
                row,
                self._tokenizer,
                self._model.eos_ids,
                self._faults,
                self._strategy,
                self._seed,
            )
        except RowRefused as refused:
            ended = RowFailed(row.id, refused.type, str(refused))
        except SessionFailed as failed:
            # An engine that is told to end fails its requests first: the row is decoded again elsewhere.
            ended = None if await self._engine.dies(ENGINE_DEATH_S) else RowFailed(row.id, "engine", str(failed))
        except WorkerLost as lost:
            self._fatal, ended = lost, None
        except Exception as error:
            # Where the engine is dead the row is not to blame: the driver decodes it again in a new one.
            ended = None if self._engine.dead else RowFailed(row.id, "decode", last_line(error))
        if ended is not None:
            self._ended.put_nowait(ended)

    async def collect(self, wait_s: float) -> tuple[list[DecodedRow | RowFailed], Progress]:
        """All rows that have ended since the last call; waits up to `wait_s` seconds for the first.

        Raises EngineLost once vLLM's engine is dead, WorkerLost once attribution cannot go on.
        """
        ended = []
        try:
            async with asyncio.timeout(wait_s):
                ended.append(await self._ended.get())
        except TimeoutError:
            pass
        while not self._ended.empty():
            ended.append(self._ended.get_nowait())
        occupancy = self._engine.occupancy
        progress = Progress(occupancy.paused, occupancy.idle_seconds, self._faults.drain(), self._tracer.drain())
        # What has ended, and the faults on the way, are handed over before the end is told of.
        if not ended and not progress.faults:
            if self._fatal is not None:
                raise self._fatal
            if self._engine.dead:
                raise EngineLost(self._engine.cause_of_death)
        return ended, progress

    async def cancel(self, batch: int) -> None:
        """Forgets all rows of the batches up to that number that have not been collected."""
        self._cancelled = batch
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while not self._ended.empty():
            self._ended.get_nowait()

    async def stop(self) -> None:
        self._engine.shutdown()


def _let_go(hold: Hold, after: list[Any]) -> None:
    try:
        ray.get(after)
    except Exception as error:
        hold.give_up(last_line(error))
    else:
        hold.let_go()
