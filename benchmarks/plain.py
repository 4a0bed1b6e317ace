"""Plain `vllm.LLM` in a process of its own, the yardstick of the throughput benchmarks."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import psutil
import torch

SHUTDOWN_S = 20
# vLLM's worker spins for a second or two after its last step; whoever has the next turn on its core waits that long.
REST_S = 3.0

# Of a GPU's memory, what vLLM must find free when it starts.
GPU_MEMORY_UTILIZATION = 0.3

Job = list[tuple[list[int], dict[str, Any]]]


def side_by_side(cache_bytes: int) -> dict[str, Any]:
    """Arguments of an engine that is loaded beside others: so large a KV cache, where it would take all of a GPU."""
    args: dict[str, Any] = {"kv_cache_memory_bytes": cache_bytes}
    if torch.cuda.is_available():
        args["gpu_memory_utilization"] = GPU_MEMORY_UTILIZATION
    return args


class PlainVLLM:
    """Greedy decoding by vLLM alone. `cores` (CPU only): those that its threads run on, None leaves it to vLLM.
    `own_process`: whether its engine has a process of its own, as by default, or is stepped by the caller's.
    """

    def __init__(self, model: str, cores: list[int] | None = None, own_process: bool = True, **engine_args: Any):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, model, cores, own_process, engine_args))
        self._process.start()
        self.pid = self._process.pid
        if self._connection.recv() != "ready":
            raise RuntimeError("plain vLLM did not start")

    def generate(self, job: Job) -> tuple[int, float]:
        """Tokens and seconds of a list of (prompt token ids, sampling parameters). Rests before and after."""
        time.sleep(REST_S)
        self._connection.send(job)
        answer = self._connection.recv()
        time.sleep(REST_S)
        return answer

    def __enter__(self) -> PlainVLLM:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        started = psutil.Process(self._process.pid).children(recursive=True)
        self._connection.send(None)
        self._process.join(SHUTDOWN_S)
        self._process.kill()
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _serve(
    connection: Connection, model: str, cores: list[int] | None, own_process: bool, engine_args: dict[str, Any]
) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(own_process))
    if cores is not None:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(model, disable_log_stats=True, **engine_args)
    connection.send("ready")
    while (job := connection.recv()) is not None:
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids, _ in job]
        params = [SamplingParams(temperature=0.0, **given) for _, given in job]
        begun = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begun
        connection.send((sum(len(output.outputs[0].token_ids) for output in outputs), seconds))
    llm.llm_engine.engine_core.shutdown()
