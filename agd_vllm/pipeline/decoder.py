"""The public class: a model with its engines and attribution workers, in the manner of vllm.LLM."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any

from agd_vllm.attribution.batch_bounds import BatchBounds
from agd_vllm.attribution.worker import WorkerInfo
from agd_vllm.engine.arguments import check_engine_args, gpus_per_engine
from agd_vllm.engine.model_copies import check_for_copies, overrides_for_copies
from agd_vllm.engine.settings import EngineSettings
from agd_vllm.faults import FaultLog
from agd_vllm.input.reader import check_rows
from agd_vllm.input.schema import parse_selector_option
from agd_vllm.models.inspect import inspect_model
from agd_vllm.pipeline import placement
from agd_vllm.pipeline.actors import kill, loaded
from agd_vllm.pipeline.fleet import Fleet
from agd_vllm.pipeline.options import DecoderOptions
from agd_vllm.pipeline.replica import ReplicaInfo
from agd_vllm.pipeline.source import Source
from agd_vllm.pipeline.teams import Demand, teams
from agd_vllm.prompts.heads import read_head_set
from agd_vllm.prompts.prepare import Preparer
from agd_vllm.records import DecodedRow, InputRow, RowError
from agd_vllm.trace import TraceFile
from agd_vllm.version import check_vllm

log = logging.getLogger("agd_vllm")


class Decoder:
    """Decodes rows on Ray: `engines` vLLM engines, `attribution_workers` copies of the model for scoring.

    with Decoder(model="...", tau=1.734) as decoder:
        for row in decoder.decode(rows):
            print(row.id, row.text, row.steps)

    Takes the keyword arguments of DecoderOptions, or one as `options`. The model is checked at once and loaded by
    `start()` (called by `with` and by the first `decode`). Raises ValueError for a model or option it cannot use.
    """

    def __init__(self, model: str | None = None, *, options: DecoderOptions | None = None, **kwargs: Any):
        if options is None:
            options = DecoderOptions.of(model, **kwargs)
        self.options = options
        self._strategy = options.strategy
        self._attribution = self._strategy.attribution(options.dtype, options.max_model_len)
        self._default_roi = parse_selector_option(options.default_roi)
        check_vllm()
        check_engine_args(options.engine_args)
        if self._attribution is not None:
            check_for_copies(options.engine_args, options.dtype)
            overrides = overrides_for_copies(options.engine_args)
            self._attribution = replace(self._attribution, overrides=overrides)
        self.model, self.tokenizer = inspect_model(
            options.model,
            pauses=self._strategy.pauses,
            attribution=self._attribution is not None,
            revision=options.engine_args.get("revision"),
            trust_remote_code=options.trust_remote_code,
            overrides=overrides_for_copies(options.engine_args),
        )
        self._own_args = self._strategy.engine_args(self.model, options.dtype, options.engine_args)
        longest = self.model.max_model_len
        if options.max_model_len is not None and options.max_model_len > longest:
            raise ValueError(f"max_model_len {options.max_model_len}: the model takes at most {longest}")
        self.roi_heads: tuple[tuple[int, int], ...] = ()
        if self._strategy.heads:
            self.roi_heads = read_head_set(self._strategy.heads, self.model.num_layers, self.model.num_heads)
        # What a chat template writes as today's: the same for all rows.
        self.date = datetime.now()
        self._fault_log = FaultLog()
        self._trace: TraceFile | None = None
        self.preparer()  # refuses chat template kwargs that cannot be set
        self._cluster: placement.Cluster | None = None
        self._info: ReplicaInfo
        self._cores: placement.Cores
        self._after: list[Any]
        self._workers: list[Any] = []
        self._asked: list[Any] | None = None
        self._infos: list[WorkerInfo] | None = None
        self._fleet: Fleet | None = None
        self.load_seconds = 0.0
        self.layout = ""

    def preparer(self, max_model_len: int | None = None) -> Preparer:
        """Rows to tokens and token weights under this run's defaults; `max_model_len` as the engine reports it."""
        options = self.options
        return Preparer(
            self.tokenizer,
            default_roi=self._default_roi,
            roi_heads=self.roi_heads,
            guided=self._strategy.regions,
            emphasized=self._strategy.emphasized,
            max_tokens=options.max_tokens,
            max_model_len=max_model_len or options.max_model_len or self.model.max_model_len,
            chat_template_kwargs=options.chat_template_kwargs,
            pause_token_id=self.model.pause_id,
            vocab_size=self.model.vocab_size,
            eos_ids=self.model.eos_ids,
            date=self.date,
        )

    def start(self) -> None:
        """Starts Ray, engines and workers, if not done yet. Raises RuntimeError where one cannot start."""
        if self._cluster is not None:
            return
        begun = time.perf_counter()
        options = self.options
        # Only now, so that a run that is refused before it starts leaves files of an earlier one alone.
        self._fault_log = FaultLog(options.log_json)
        self._trace = TraceFile(options.trace) if options.trace else None
        demand = Demand(options.engines, options.workers, gpus_per_engine(options.engine_args))
        self._cluster = placement.connect(demand, options.debug)
        try:
            self._fleet = self._start_actors(self._cluster)
        except BaseException:
            self.close()
            raise
        self.load_seconds = time.perf_counter() - begun

    def _started(self) -> Fleet:
        self.start()
        assert self._fleet is not None
        return self._fleet

    def loads_as(self, other: Decoder) -> bool:
        """Whether the engines and workers of `other` serve this one's rows, too."""
        return self._loaded() is not None and self._loaded() == other._loaded()

    def _loaded(self) -> tuple | None:
        """What is decided while engines and workers are loaded; None where they serve one run only."""
        options = self.options
        if self._strategy.inline or options.trace:
            return None
        settings = (self.model, self._engine_settings(), self._attribution)
        return *settings, options.engines, options.workers, options.debug

    def take_over(self, other: Decoder) -> bool:
        """Takes the running engines and workers of `other`, which then has none; False where they do not serve it."""
        begun = time.perf_counter()
        if other._fleet is None or other._cluster is None or not self.loads_as(other):
            return False
        cluster = self._cluster = other._cluster
        self._fault_log = FaultLog(self.options.log_json)

        def tell(replica: Any) -> Any:
            return replica.serve.remote(self._strategy)

        try:
            other._fleet.serve(partial(self._make_replica, cluster), self._attach, tell, self._fault_log)
        except RuntimeError as error:
            log.debug("engines are loaded anew: %s", error)
            self._cluster = None
            return False
        self._workers, self._infos, self._fleet = other._workers, other._infos, other._fleet
        self._info, self._cores, self._after, self.layout = other._info, other._cores, other._after, other.layout
        other._cluster, other._workers, other._infos, other._fleet = None, [], None, None
        self.load_seconds = time.perf_counter() - begun
        return True

    def _engine_settings(self) -> EngineSettings:
        options = self.options
        return EngineSettings(
            dtype=options.dtype,
            max_model_len=options.max_model_len,
            seed=options.seed,
            trust_remote_code=options.trust_remote_code,
            engine_args=self._own_args | {k: v for k, v in options.engine_args.items() if k != "revision"},
            processors=self._strategy.processors,
            plain=self._strategy.inline,
            kv_planes=self._strategy.kv_planes,
        )

    def _make_replica(self, cluster: placement.Cluster, index: int) -> Any:
        return placement.make_replica(
            cluster,
            index,
            self.model,
            replace(self._engine_settings(), cores=self._cores[index]),
            self._strategy,
            self._trace is not None,
            self.options.debug,
            self._after,
        )

    def _start_actors(self, cluster: placement.Cluster) -> Fleet:
        options = self.options
        self._cores, worker_cores = placement.cores(cluster, options.engines, options.workers)
        self.layout = placement.layout(cluster.shares, self._cores, worker_cores)
        self.layout += self._strategy.layout
        if self._attribution is not None:
            self._workers = [
                placement.make_worker(
                    cluster, index, self.model, replace(self._attribution, cores=cores), options.debug
                )
                for index, cores in enumerate(worker_cores)
            ]
        # Who shares a GPU with workers imports while they load, and takes memory when they have theirs.
        self._after = self._ask_workers() if cluster.shares.shared else []
        fleet = self._fleet = Fleet(
            make=partial(self._make_replica, cluster),
            attach=self._attach,
            count=options.engines,
            faults=self._fault_log,
            trace=self._trace,
            one_by_one=cluster.shares.shared,
        )
        try:
            self._info = fleet.start()
        except RuntimeError:
            if self._after:
                # It may have waited for a worker that could not start: that is said then.
                self._wait_for_workers()
            raise
        return fleet

    def _attach(self, index: int, replica: Any) -> None:
        """Tells an engine who scores."""
        if not self._workers:
            replica.attach.remote([], False, None, BatchBounds())
            return
        infos = self._wait_for_workers()
        made = teams(self.options.engines, len(self._workers))
        team = made[index % len(made)]
        info, tokens = infos[0], None
        if info.cache_tokens is not None:
            tokens = sum(infos[worker].cache_tokens for worker in team.workers) // len(team.engines)
        mine = [self._workers[worker] for worker in team.workers]
        replica.attach.remote(mine, info.stateful, tokens, info.bounds)

    def _ask_workers(self) -> list[Any]:
        """For their `info`, once, before the first rows: later they are busy, or restart."""
        if self._asked is None:
            self._asked = [worker.info.remote() for worker in self._workers]
        return self._asked

    def _wait_for_workers(self) -> list[WorkerInfo]:
        """Until their models are loaded."""
        if self._infos is None:
            self._infos = loaded(self._ask_workers(), "an attribution worker")
        return self._infos

    def decode(
        self, rows: Iterable[dict[str, Any]], on_error: Callable[[RowError], None] | None = None
    ) -> Iterator[DecodedRow]:
        """Decodes `rows` (dicts as in the input file) and yields them in completion order.

        Rows are taken as room allows, so `rows` may be endless. A row that cannot be decoded goes to `on_error`
        (default: a warning in the log) and the rest goes on.
        """
        report = on_error or _warn
        for outcome in self.outcomes(check_rows(rows)):
            if isinstance(outcome, RowError):
                report(outcome)
            elif outcome is not None:
                yield outcome

    def outcomes(self, items: Iterable[InputRow | RowError]) -> Iterator[DecodedRow | RowError | None]:
        """As `decode`, for rows that are parsed already: every item comes out exactly once, decoded or as an error.

        None comes now and then while nothing ends, for callers that have something else to do in time.
        """
        yield from self._started().decode(Source(items, self.preparer(self._info.max_model_len)))

    @property
    def waiting_for_attribution(self) -> int:
        """Rows that wait for scores, as last heard."""
        return self._fleet.waiting_for_attribution if self._fleet else 0

    @property
    def engine_idle_seconds(self) -> float:
        """Seconds in which an engine had rows and nothing to run, because all of them waited for attribution."""
        return self._fleet.idle_seconds if self._fleet else 0.0

    @property
    def faults(self) -> dict[str, int]:
        """Counts of what went wrong and was mended since the start."""
        return dict(self._fault_log.counts)

    def close(self) -> None:
        """Stops the actors, and Ray if this decoder started it. Safe to call twice."""
        try:
            if self._fleet:
                self._fleet.close()
        finally:
            self._close_rest()

    def _close_rest(self) -> None:
        for worker in self._workers:
            kill(worker)
        self._workers, self._infos, self._asked = [], None, None
        if self._cluster is not None:
            placement.disconnect(self._cluster)
            self._cluster = None
        if self._trace is not None:
            self._trace.close()

    def __enter__(self) -> Decoder:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _warn(error: RowError) -> None:
    log.warning("row %s (line %d): %s", error.id, error.line, error.message)
