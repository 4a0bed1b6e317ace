"""Where does the pipeline saturate, and how many workers does an engine need? Simulated, for 1 to 64 engines.

    agd-vllm decode prompts.jsonl --model M --output RUN --trace TRACE.json
    python -m benchmarks.scaling RUN TRACE.json --json OUT.json

The scheduler is the real one: admission, the loop of a row, the attribution pool with its batches. What it waits for is
simulated, in virtual time: an engine's step takes what steps of so many rows took in the run (a line through the
medians of TRACE), a worker's batch a constant and so much for each step and token (a fit to TRACE); lengths and guided
share of rows are those of RUN. Devices are assumed not to slow each other, the network and an engine's prefill to take
no time.
"""

from __future__ import annotations

import asyncio
import json
import random
import selectors
from collections import deque
from collections.abc import Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from agd_vllm.attribution.batch_bounds import BatchBounds
from agd_vllm.attribution.pool import AttributionPool
from agd_vllm.attribution.worker import ScoredBatch
from agd_vllm.engine.admission import Admission
from agd_vllm.engine.events import Finished
from agd_vllm.engine.occupancy import Occupancy
from agd_vllm.engine.settings import GateSettings
from agd_vllm.faults import FaultLog
from agd_vllm.pipeline.replica import POOL_DEADLINE_S
from agd_vllm.pipeline.teams import teams
from agd_vllm.records import Gate, PreparedRow, Roi, ScoreRequest, Span
from agd_vllm.strategies.agd import Agd
from agd_vllm.strategies.row_loop import decode_row
from agd_vllm.trace import Tracer
from benchmarks.machine import write_result

EOS, TOKEN = 0, 1
ROI = Roi((Span(0, 1),))
CANDIDATES = ((TOKEN, TOKEN + 1), (0.5, 0.4))


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer instead of waiting for it."""

    def __init__(self):
        self._now = 0.0
        loop = self

        class Selector(selectors.DefaultSelector):
            def select(self, timeout=None):
                loop._now += timeout or 0
                return super().select(0)

        super().__init__(Selector())

    def time(self) -> float:
        return self._now


@dataclass(frozen=True, slots=True)
class Measured:
    """Service times in seconds and the rows' statistics."""

    engine_seconds: list[float]  # of a step, by its rows
    batch: tuple[float, float, float]  # constant, for each guided step, for each token
    prompt_token: float  # for each token of a prompt
    rows: list[tuple[int, int]]  # tokens of prompt and output
    guided_share: float

    def engine_step(self, rows: int) -> float:
        last = len(self.engine_seconds) - 1
        slope = (self.engine_seconds[last] - self.engine_seconds[1]) / (last - 1)
        return self.engine_seconds[rows] if rows <= last else self.engine_seconds[last] + (rows - last) * slope

    def worker_batch(self, steps: int, tokens: int) -> float:
        constant, per_step, per_token = self.batch
        if not steps:
            return tokens * self.prompt_token
        return constant + steps * per_step + tokens * per_token


def measured(run: Path, trace: Path) -> Measured:
    """Read a run and its trace. Raises ClickException where these hold too little."""
    text = trace.read_text().rstrip().rstrip(",")
    events = [event for event in json.loads(text + "]") if event["ph"] == "X"]
    steps = [(e["args"]["rows"], e["dur"] / 1e6) for e in events if e["name"] == "engine step"]
    batches = [(e["args"]["steps"], e["args"]["tokens"], e["dur"] / 1e6) for e in events if e["name"] == "score"]
    prompts = [(e["args"]["tokens"], e["dur"] / 1e6) for e in events if e["name"] == "prefill"]
    rows = pq.read_table(run / "results", columns=["prompt_token_ids", "token_ids", "num_guided"]).to_pylist()
    if len({count for count, _ in steps}) < 3 or len(batches) < 30:
        raise click.ClickException(f"{trace}: too short a run; decode some 30 rows at least")
    known = sorted({count for count, _ in steps})
    medians = [float(np.median([seconds for count, seconds in steps if count == rows])) for rows in known]
    # Rounds of prefill are rare and long: a step's time grows with its rows, so take the line through the medians.
    usual = [index for index, count in enumerate(known) if sum(c == count for c, _ in steps) >= 3]
    line = np.polyfit([known[i] for i in usual], [medians[i] for i in usual], 1)
    design = np.array([[1, count, tokens] for count, tokens, _ in batches])
    fit = np.linalg.lstsq(design, np.array([seconds for *_, seconds in batches]), rcond=None)[0]
    prompt_token = sum(s for _, s in prompts) / sum(t for t, _ in prompts) if prompts else float(fit[2])
    lengths = [(len(row["prompt_token_ids"]), len(row["token_ids"])) for row in rows]
    return Measured(
        [0.0, *(float(np.polyval(line, count)) for count in range(1, max(known) + 1))],
        tuple(map(float, fit)),
        prompt_token,
        lengths,
        sum(row["num_guided"] for row in rows) / sum(output for _, output in lengths),
    )


class SimulatedWorker:
    """As the actor: one call at a time, in their order."""

    def __init__(self, measured: Measured):
        self._measured = measured
        self._turn = asyncio.Lock()
        self.busy = 0.0
        self.score = SimpleNamespace(remote=self._score)

    async def _score(self, requests: list[ScoreRequest], released: list[str]) -> ScoredBatch:
        async with self._turn:
            tokens = sum(len(request.token_ids) for request in requests)
            steps = sum(bool(request.candidate_ids) for request in requests)
            seconds = self._measured.worker_batch(steps, tokens)
            self.busy += seconds
            await asyncio.sleep(seconds)
        return ScoredBatch([[1.0] * len(request.candidate_ids) for request in requests], 0.0, seconds)


class SimulatedSession:
    def __init__(self, engine: SimulatedEngine, stops, length: int):
        self._engine, self._stops, self._length = engine, stops, length
        self.waiter: asyncio.Future | None = None

    async def next(self) -> Gate | Finished:
        self.waiter = asyncio.get_running_loop().create_future()
        self._engine.run(self)
        return await self.waiter

    def step(self) -> bool:
        """One step of the engine; whether the session goes on in the next one."""
        step = len(self._stops.token_ids)
        if self._engine.gates():
            self.waiter.set_result(Gate(step, 2.0, *CANDIDATES))
            return False
        if reason := self._stops.add(self._token(step)):
            self.waiter.set_result(Finished(reason))
            return False
        return True

    def select(self, token_id: int) -> Finished | None:
        reason = self._stops.add(self._token(len(self._stops.token_ids)))
        return Finished(reason) if reason else None

    def _token(self, step: int) -> int:
        return EOS if step + 1 >= self._length else TOKEN


class SimulatedEngine:
    """Steps all sessions that can run, together, as vLLM does."""

    def __init__(self, measured: Measured, sessions: int, lengths: dict[str, int], guided_share: float, seed: int):
        self._measured, self._lengths, self._guided_share = measured, lengths, guided_share
        self._admission = Admission(1 << 40, 1, sessions, 1 << 20)
        self._random = random.Random(seed)
        self._runnable: list[SimulatedSession] = []
        self._loop: asyncio.Task | None = None
        self.occupancy = Occupancy()
        self.busy = 0.0

    @asynccontextmanager
    async def session(self, row: PreparedRow, stops, gate: GateSettings | None = None, repetition_penalty: float = 1.0):
        async with self._admission.reserve(row, gate is not None):
            with self.occupancy.session():
                yield SimulatedSession(self, stops, self._lengths[row.id])

    def gates(self) -> bool:
        return self._random.random() < self._guided_share

    def run(self, session: SimulatedSession) -> None:
        self._runnable.append(session)
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._step_on())

    async def _step_on(self) -> None:
        while self._runnable:
            sessions, self._runnable = self._runnable, []
            seconds = self._measured.engine_step(len(sessions))
            self.busy += seconds
            await asyncio.sleep(seconds)
            self._runnable += [session for session in sessions if session.step()]


async def simulate(measured: Measured, engines: int, workers: int, sessions: int, rows: int) -> dict[str, Any]:
    """`rows` rows on each engine, `sessions` of them side by side; without workers all are decoded greedily."""
    pool_of_rows = random.Random(0)
    made, actors = [], [SimulatedWorker(measured) for _ in range(workers)]
    tasks: deque[asyncio.Task] = deque()
    loop = asyncio.get_running_loop()
    # It knows no token: rows have no text.
    tokenizer = SimpleNamespace(backend_tokenizer=Tokenizer(WordLevel({}, unk_token="")))
    for index in range(engines):
        chosen = {f"{index}-{row}": pool_of_rows.choice(measured.rows) for row in range(rows)}
        share = measured.guided_share if workers else 0.0
        engine = SimulatedEngine(
            measured, sessions, {name: output for name, (_, output) in chosen.items()}, share, index
        )
        pool = None
        if workers:
            made_teams = teams(engines, workers)
            mine = [actors[worker] for worker in made_teams[index % len(made_teams)].workers]
            pool = AttributionPool(mine, True, POOL_DEADLINE_S, FaultLog(), Tracer(False), BatchBounds())
        made.append(engine)
        for name, (prompt, output) in chosen.items():
            row = PreparedRow(name, [TOKEN] * prompt, ROI, output + 1)
            tasks.append(
                asyncio.create_task(decode_row(engine, pool, row, tokenizer, frozenset([EOS]), FaultLog(), Agd()))
            )
    done = await asyncio.gather(*tasks)
    seconds = loop.time()
    return {
        "engines": engines,
        "workers": workers,
        "tokens_per_second": sum(len(row.token_ids) for row in done) / seconds,
        "engine_busy": sum(engine.busy for engine in made) / engines / seconds,
        "worker_busy": sum(worker.busy for worker in actors) / workers / seconds if workers else 0.0,
    }


def points(measured: Measured, counts: list[int], ratios: list[float], sessions: int, rows: int) -> Iterator[dict]:
    for engines in counts:
        greedy = _run(simulate(measured, engines, 0, sessions, rows))
        for ratio in ratios:
            workers = round(engines * ratio)
            if workers:
                point = _run(simulate(measured, engines, workers, sessions, rows))
                point["agd_over_greedy"] = point["tokens_per_second"] / greedy["tokens_per_second"]
                click.echo(json.dumps(point))
                yield point


def _run(simulation) -> dict[str, Any]:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(simulation)


def _numbers(_context, _parameter, value: str) -> list[float]:
    return [float(part) for part in value.split(",")]


@click.command(help=__doc__)
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.argument("trace", type=click.Path(exists=True, path_type=Path))
@click.option("--engines", default="1,2,4,8,16,32,64", show_default=True, callback=_numbers)
@click.option("--ratios", default="0.25,0.5,1,2", show_default=True, callback=_numbers, help="Workers for each engine.")
@click.option("--sessions", type=int, default=32, show_default=True, help="Rows side by side on an engine.")
@click.option("--rows", type=int, default=96, show_default=True, help="Rows of each engine.")
@click.option("--json", "output", required=True)
def main(run, trace, engines, ratios, sessions, rows, output):
    found = measured(run, trace)
    result = {
        "simulated": True,
        "points": list(points(found, [int(count) for count in engines], ratios, sessions, rows)),
        "sessions": sessions,
        "rows_per_engine": rows,
        "guided_share": found.guided_share,
        "engine_step_seconds": {"1": found.engine_seconds[1], f"{sessions}": found.engine_step(sessions)},
        "worker_batch_seconds": dict(zip(("constant", "step", "token"), found.batch, strict=True)),
        "prompt_token_seconds": found.prompt_token,
    }
    write_result(output, result)


if __name__ == "__main__":
    main()
