"""vLLM stepped by a thread of this process: on a CPU the processes of AsyncLLM would take the cores from the model."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from typing import Any

import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMClientError
from vllm.outputs import RequestOutput

# As vLLM's own engine process says what it dies of.
log = logging.getLogger("vllm.agd_vllm")

STOP_S = 10.0


class SteppedLLM:
    """As much of AsyncLLM as plain requests need: `generate`, `errored`, `shutdown`. Make it inside a running event
    loop; loads the model, on these `cores` (None: all), and raises what vLLM raises.

    Everything of vLLM's runs on one thread, which OpenMP's threads belong to.
    """

    def __init__(self, config: Any, cores: list[int] | None):
        self.vllm_config = config
        self._loop = asyncio.get_running_loop()
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        self._outputs: dict[str, asyncio.Queue] = {}
        self._error: BaseException | None = None
        loaded: Future = Future()
        self._thread = threading.Thread(target=self._run, args=(config, cores, loaded), name="vllm", daemon=True)
        self._thread.start()
        loaded.result()

    @property
    def errored(self) -> bool:
        return self._error is not None

    async def generate(
        self, prompt: Any, params: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        """The request's outputs. Raises what the engine died of; leaving early aborts the request."""
        outputs = self._outputs[request_id] = asyncio.Queue()
        finished = False
        try:
            if self._error is not None:
                raise self._error
            self._calls.put(("add", request_id, prompt, params))
            while not finished:
                output = await outputs.get()
                if isinstance(output, BaseException):
                    raise output
                finished = output.finished
                yield output
        finally:
            del self._outputs[request_id]
            if not finished:
                self._calls.put(("abort", request_id, None, None))

    def shutdown(self) -> None:
        self._calls.put(("stop", "", None, None))
        self._thread.join(STOP_S)

    def _run(self, config: Any, cores: list[int] | None, loaded: Future) -> None:
        try:
            if cores is not None:
                os.sched_setaffinity(0, cores)
                torch.set_num_threads(len(cores))
            engine = _engine(config)
        except BaseException as error:
            loaded.set_exception(error)
            return
        loaded.set_result(None)
        try:
            while self._take_calls(engine):
                self._tell(engine.step())
        except BaseException as error:
            log.exception("the engine died")
            self._error = error
            self._loop.call_soon_threadsafe(self._fail, error)
        else:
            engine.engine_core.shutdown()

    def _take_calls(self, engine: Any) -> bool:
        """All that has been asked for; waits where there is nothing to decode. False: to stop."""
        idle = not engine.has_unfinished_requests()
        while idle or not self._calls.empty():
            kind, request_id, prompt, params = self._calls.get()
            if kind == "stop":
                return False
            if kind == "abort":
                engine.abort_request([request_id])
            else:
                self._add(engine, request_id, prompt, params)
            idle = not engine.has_unfinished_requests()
        return True

    def _add(self, engine: Any, request_id: str, prompt: Any, params: SamplingParams) -> None:
        try:
            engine.add_request(request_id, prompt, params)
        except (ValueError, VLLMClientError) as error:
            # The row's own fault: the engine goes on.
            self._loop.call_soon_threadsafe(self._put, request_id, error)

    def _tell(self, outputs: list[RequestOutput]) -> None:
        if outputs:
            self._loop.call_soon_threadsafe(self._put_all, outputs)

    def _put_all(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            self._put(output.request_id, output)

    def _put(self, request_id: str, output: RequestOutput | BaseException) -> None:
        # A row that was left in the meantime hears nothing.
        if request_id in self._outputs:
            self._outputs[request_id].put_nowait(output)

    def _fail(self, error: BaseException) -> None:
        for request_id in self._outputs:
            self._put(request_id, error)


def _engine(config: Any) -> Any:
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor.abstract import Executor

    return LLMEngine(config, Executor.get_class(config), log_stats=False, multiprocess_mode=False)
