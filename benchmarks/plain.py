"""Plain `vllm.LLM` in a process of its own, the yardstick of the throughput benchmarks."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import psutil
import torch

SHUTDOWN_S = 20
# On a CPU vLLM's worker spins for a second or two after its last step; whoever has the next turn on its core waits that
# long.
REST_S = 0.0 if torch.cuda.is_available() else 3.0

# Of a GPU's memory, what vLLM must find free when it starts.
GPU_MEMORY_UTILIZATION = 0.3

Job = list[tuple[list[int], dict[str, Any]]]
"""Prompt token ids and sampling parameters."""


def side_by_side(cache_bytes: int) -> dict[str, Any]:
    """Arguments of an engine that is loaded beside others: so large a KV cache, where it would take all of a GPU."""
    args: dict[str, Any] = {"kv_cache_memory_bytes": cache_bytes}
    if torch.cuda.is_available():
        args["gpu_memory_utilization"] = GPU_MEMORY_UTILIZATION
    return args


class PlainVLLM:
    """Greedy decoding by vLLM alone. `cores` (CPU only): those that its threads run on, None leaves it to vLLM.
    `own_process`: whether its engine has a process of its own, as by default, or is stepped by the caller's, which is
    faster on a CPU. `rest`: seconds before and after each job.
    """

    def __init__(
        self,
        model: str,
        cores: list[int] | None = None,
        own_process: bool = True,
        rest: float = REST_S,
        **engine_args: Any,
    ):
        assert torch.cuda.memory_reserved() == 0, "this process holds memory of the GPU that its engines need"
        self._rest = rest
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, model, cores, own_process, engine_args))
        self._process.start()
        # The child has it now: where it dies, nobody is left to write, and reading ends.
        theirs.close()
        self.pid = self._process.pid
        self._receive()

    def generate(self, job: Job, side_by_side: int | None = None) -> tuple[int, float, int]:
        """Tokens, seconds and guided steps of a job. Rests before and after.

        The engine gets all rows at once, or so many `side_by_side`: the next one when one of these ends.
        """
        time.sleep(self._rest)
        self._connection.send((job, side_by_side))
        answer = self._receive()
        time.sleep(self._rest)
        return answer

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError as error:
            raise RuntimeError("plain vLLM died; what it died of stands above") from error

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


def _continuously(llm: Any, prompts: list[Any], params: list[Any], side_by_side: int) -> list[Any]:
    """Outputs in the order of the prompts, of which so many are decoded at a time."""
    from vllm.sampling_params import RequestOutputKind

    outputs: dict[str, Any] = {}
    waiting = iter(zip(prompts, params, strict=True))
    while len(outputs) < len(prompts):
        running = llm.llm_engine.get_num_unfinished_requests()
        for prompt, given in itertools.islice(waiting, side_by_side - running):
            # As `LLM.generate` has it.
            given.output_kind = RequestOutputKind.FINAL_ONLY
            llm.llm_engine.add_request(str(next(llm.request_counter)), prompt, given)
        outputs |= {output.request_id: output for output in llm.llm_engine.step() if output.finished}
    return [outputs[request_id] for request_id in sorted(outputs, key=int)]


def _serve(
    connection: Connection, model: str, cores: list[int] | None, own_process: bool, engine_args: dict[str, Any]
) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(own_process))
    if cores is not None:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    from agd_vllm.inline import Reports

    # As inline attribution's engines have them: reports cost what they cost in a run.
    reports = Reports()
    llm = LLM(model, disable_log_stats=True, **engine_args)
    connection.send("ready")
    while (asked := connection.recv()) is not None:
        job, side_by_side = asked
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids, _ in job]
        params = [SamplingParams(temperature=0.0, **given) for _, given in job]
        for each in params:
            if each.extra_args:
                reports.follow(each)
        begun = time.perf_counter()
        if side_by_side is None:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        else:
            outputs = _continuously(llm, prompts, params, side_by_side)
        seconds = time.perf_counter() - begun
        ids = [list(output.outputs[0].token_ids) for output in outputs]
        guided = sum(
            len(reports.guided_steps(each, row)) for each, row in zip(params, ids, strict=True) if each.extra_args
        )
        connection.send((sum(map(len, ids)), seconds, guided))
    llm.llm_engine.engine_core.shutdown()
