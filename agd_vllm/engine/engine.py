"""AsyncLLM with our logits processors installed: start, the sessions of a row, shut down."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import time
from collections.abc import Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from typing import Any

from agd_vllm.engine.admission import Admission
from agd_vllm.engine.arguments import gpus_per_engine
from agd_vllm.engine.channel import TRACE_VARIABLE, EngineStep, GateReceiver
from agd_vllm.engine.environment import in_this_process, on_cpu, runs_v1, set_environment
from agd_vllm.engine.gpu import check_gpu
from agd_vllm.engine.hold import HELD_WORKER, Hold
from agd_vllm.engine.occupancy import Occupancy
from agd_vllm.engine.settings import EngineSettings, GateSettings
from agd_vllm.models.host import memory_bytes
from agd_vllm.models.inspect import ModelInfo
from agd_vllm.records import PreparedRow, RowRefused
from agd_vllm.trace import Tracer

CPU_MEMORY_SHARE = 1 / 8
# Tokens of a step of an inline engine: the temporaries of its batch of prompts then stay in a CPU's cache.
CPU_BATCH_TOKENS = 512
# With something to run, an engine that gives no token at all for so long hangs.
SILENCE_S = 900.0
# The gate by vLLM's interface: Model Runner V2, or V1. What else a strategy may ask for serves both.
GATE_PROCESSORS = {
    True: "agd_vllm.engine.gate_v2:GateProcessorV2",
    False: "agd_vllm.engine.gate_v1:GateProcessorV1",
}
CONTRAST_PROCESSOR = "agd_vllm.engine.contrast:ContrastProcessor"
ENTROPY_PROCESSOR = "agd_vllm.engine.entropies:EntropyProcessor"


class Engine:
    """Make and use it inside one running event loop. `start()` loads the model and may take minutes."""

    def __init__(self, model: ModelInfo, settings: EngineSettings, tracer: Tracer):
        self._model = model
        self._settings = settings
        self._tracer = tracer
        self.occupancy = Occupancy()
        self._keys = itertools.count()
        # How many stop tokens the model runner masks until a row has its min_tokens.
        self._max_held_stops = sys.maxsize

    def start(self, hold: Hold | None = None) -> None:
        """With a `hold`, made in this process, it takes memory of its GPU only when it is let go. `steer` follows."""
        self._receiver = GateReceiver(self._trace_step)
        asyncio.get_running_loop().add_reader(self._receiver.fileno(), self._receiver.drain)
        engine_args = self._engine_args()
        set_environment(self._settings.cores, engine_args["dtype"], gpus_per_engine(self._settings.engine_args))
        if self._tracer.enabled:
            os.environ[TRACE_VARIABLE] = "1"
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        args = AsyncEngineArgs(**engine_args)
        stepped = self._settings.plain and runs_v1()
        with in_this_process() if stepped else nullcontext():
            # vLLM's sizes of a batch for offline use, as in vllm.LLM.
            config = args.create_engine_config(UsageContext.LLM_CLASS)
        self._fit_model_runner(config)
        if hold is not None:
            config.parallel_config.worker_cls = HELD_WORKER
        if not on_cpu():
            check_gpu(config, self._settings.kv_planes)
        if stepped:
            from agd_vllm.engine.stepped import SteppedLLM

            self._llm = SteppedLLM(config, self._settings.cores)
        else:
            try:
                self._llm = AsyncLLM.from_vllm_config(config, disable_log_stats=args.disable_log_stats)
            except Exception as error:
                # vLLM says no more than that one of its processes failed.
                self._receiver.drain()
                if self._receiver.failure is None:
                    raise
                raise RuntimeError(self._receiver.failure) from error
        self.max_model_len: int = config.model_config.max_model_len
        self.max_sessions: int = config.scheduler_config.max_num_seqs
        self._admission = Admission(
            config.cache_config.num_gpu_blocks,
            config.cache_config.block_size,
            self.max_sessions,
            self.max_model_len,
        )
        self._pair_slots = list(range(self.max_sessions // 2))

    def _fit_model_runner(self, config: Any) -> None:
        """Installs the processors for the model runner that vLLM takes, which depends on all of its configuration."""
        v2, processors = config.use_v2_model_runner, self._settings.processors
        # V1's sampler does so after all processors: where one chooses, it must do it itself.
        self._penalizes_first = v2
        if config.scheduler_config.async_scheduling and not v2:
            raise ValueError("--engine-arg async_scheduling: only with vLLM's Model Runner V2; leave it out")
        config.model_config.logits_processors = [*(() if self._settings.plain else (GATE_PROCESSORS[v2],)), *processors]
        if v2:
            from vllm.v1.worker.gpu.sample.logit_bias import MAX_NUM_STOP_TOKEN_IDS

            self._max_held_stops = MAX_NUM_STOP_TOKEN_IDS

    def _engine_args(self) -> dict[str, Any]:
        settings = self._settings
        args: dict[str, Any] = {
            "model": self._model.path,
            "revision": self._model.revision,
            "dtype": settings.dtype,
            "max_model_len": settings.max_model_len,
            "seed": settings.seed,
            "trust_remote_code": settings.trust_remote_code,
            "disable_log_stats": True,
            # One block size for all layers: admission counts blocks of one kind.
            "disable_hybrid_kv_cache_manager": True,
            # With it each pause wastes one row of a step.
            "async_scheduling": False,
        }
        if gpus_per_engine(settings.engine_args) > 1:
            # All of them are this actor's; within a placement group vLLM would ask Ray for others.
            args["distributed_executor_backend"] = "mp"
        if on_cpu() and "gpu_memory_utilization" not in settings.engine_args:
            args["kv_cache_memory_bytes"] = int(memory_bytes() * CPU_MEMORY_SHARE)
        if settings.plain:
            # Nothing pauses.
            del args["async_scheduling"]
            if on_cpu():
                args["max_num_batched_tokens"] = CPU_BATCH_TOKENS
        args |= settings.engine_args
        if settings.processors and not settings.plain:
            # A pair of rows is resumed together: with it one of them would run ahead.
            args["async_scheduling"] = False
        return args

    async def steer(self, strength: float | None) -> None:
        """Multiplies the model's steering vectors with `strength` (None: it has none). After `start`, and with no row
        in flight."""
        if strength is not None:
            await self._llm.collective_rpc("set_steering_strength", args=(strength,))

    async def steer_anew(self, strength: float | None) -> None:
        """As `steer`, for an engine that has decoded: no prefix stays cached from before."""
        await self.steer(strength)
        await self._llm.reset_prefix_cache()

    def limit_attribution(self, cache_tokens: int | None, block_tokens: int) -> None:
        """Gated rows are admitted only while the attribution workers' caches, which consist of blocks of so many
        tokens, could hold them all; None: no limit."""
        self._admission.limit_attribution(cache_tokens, block_tokens)

    @asynccontextmanager
    async def session(
        self,
        row: PreparedRow,
        stops,
        gate: GateSettings | None = None,
        *,
        entropies: bool = False,
        repetition_penalty: float = 1.0,
    ):
        """Waits for room, opens the row's session, closes it at the end.

        With a `gate` it pauses there. For rows without one only entropies are recorded and the `repetition_penalty`
        (as in vLLM's SamplingParams, of prompt and output) is applied. Raises RowRefused for too large a row, and for
        one with more stop tokens than vLLM can hold back until its min_tokens.
        """
        from agd_vllm.engine.entropies import EntropyParams
        from agd_vllm.engine.gate_params import GateParams

        self._check_stops(row)
        if self._settings.plain:
            async with self.request(row, stops, repetition_penalty=repetition_penalty) as request:
                yield request
            return
        async with self._admission.reserve(row, gate is not None):
            params = None
            if gate is not None:
                params = GateParams(
                    next(self._keys),
                    len(row.prompt_token_ids),
                    self._model.pause_id,
                    gate.tau,
                    gate.top_k,
                    gate.min_prob,
                )
            elif entropies:
                params = EntropyParams(next(self._keys), len(row.prompt_token_ids))
                self._receiver.record_entropies(params.key)
            session = self._open(row, stops, params, repetition_penalty)
            try:
                with self.occupancy.session():
                    yield session
            finally:
                await session.close()

    @asynccontextmanager
    async def request(
        self,
        row: PreparedRow,
        stops,
        make_params: Callable[[int], Any] | None = None,
        repetition_penalty: float = 1.0,
    ):
        """The row as a plain request, guided by what `make_params` makes of a key; vLLM queues and preempts it."""
        from agd_vllm.engine.plain_request import PlainRequest

        self._check_stops(row)
        params = make_params(next(self._keys)) if make_params else None
        sign, told = self.occupancy.sign_of_life, params is None or self._penalizes_first
        penalty = repetition_penalty if told else 1.0
        request = PlainRequest(self._llm, self._receiver, row, stops, f"{next(self._keys)}", params, sign, penalty)
        try:
            with self.occupancy.session():
                yield request
        finally:
            await request.close()

    def _check_stops(self, row: PreparedRow) -> None:
        ids = {*self._model.eos_ids, *row.stop_token_ids, self._model.pause_id} - {None}
        if row.min_tokens and len(ids) > self._max_held_stops:
            # vLLM's worker raises, which is the end of the engine.
            raise RowRefused(
                "stop_token_ids",
                f"stop_token_ids and the model's own make {len(ids)} stop tokens, with min_tokens vLLM takes at most "
                f"{self._max_held_stops} on a GPU; give fewer, or no min_tokens",
            )

    @asynccontextmanager
    async def pair(
        self, row: PreparedRow, without_region: list[int], alpha: float, stops, repetition_penalty: float = 1.0
    ):
        """As `session`, for a row and its contrast with the prompt `without_region`, side by side. The contrast is
        penalised, by the prompt with the region and the output."""
        from agd_vllm.engine.contrast import ContrastParams
        from agd_vllm.engine.pair import PairSession

        beside = replace(row, prompt_token_ids=without_region, stop=())
        async with self._admission.reserve(row, False, beside):
            key, slot = next(self._keys), self._pair_slots.pop()
            params = [
                ContrastParams(
                    key,
                    slot,
                    sequence is row,
                    len(sequence.prompt_token_ids),
                    len(stops.token_ids),
                    self._model.pause_id,
                    alpha,
                    repetition_penalty,
                )
                for sequence in (row, beside)
            ]
            follower_stops = stops.follower()
            leader = self._open(row, stops, params[0])
            follower = self._open(beside, follower_stops, params[1])
            pair = PairSession(leader, follower, self._receiver, key, stops, follower_stops)
            try:
                with self.occupancy.session():
                    yield pair
            finally:
                self._pair_slots.append(slot)
                await pair.close()

    def _open(self, row: PreparedRow, stops, params, repetition_penalty: float = 1.0):
        from agd_vllm.engine.session import Session

        common = (self._keys, self._settings.deadline_s, self.occupancy.sign_of_life, repetition_penalty)
        return Session(self._llm, self._receiver, row, stops, params, *common)

    def _trace_step(self, step: EngineStep) -> None:
        gate_ms = round(step.gate_seconds * 1e3, 3)
        self._tracer.add("vLLM", "engine step", step.begun, step.seconds, rows=step.rows, gate_ms=gate_ms)

    @property
    def dead(self) -> bool:
        """vLLM's engine is gone, or as good as gone: silent with something to run."""
        return self._llm.errored or self.occupancy.silent_seconds > SILENCE_S

    @property
    def cause_of_death(self) -> str:
        if not self._llm.errored:
            return f"vLLM gave no token for {SILENCE_S:g} s"
        self._receiver.drain()
        return f"vLLM's engine died: {self._receiver.failure or 'its process ended without a word'}"

    async def dies(self, within_s: float) -> bool:
        """Whether the engine is dead, or is found to be so soon: vLLM fails its requests before it says so."""
        deadline = time.monotonic() + within_s
        while not self.dead and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        return self.dead

    def shutdown(self) -> None:
        self._llm.shutdown()
        self._receiver.close()
