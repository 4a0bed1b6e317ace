"""Fixtures shared by all tests: the real demo model, engines of their own loop, plain vLLM as the oracle."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from agd_vllm.models import demo
from agd_vllm.records import Gate, PreparedRow

pytest_plugins = [
    "counted_starts",
    "made_decoding",
    "quick_tests",
    "real_runs",
    "s3_store",
    "tiny_oracle",
    "tiny_smollm2",
    "two_workers",
    "group_fixtures",
]
# In a process of their own (test_triton_kernels.py): Triton interprets either all or nothing.
# By hand: TRITON_INTERPRET=1 pytest tests/interpreted
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]

CHECKOUT = Path(__file__).resolve().parent.parent
DEMO_ROWS = CHECKOUT / "examples/demo.jsonl"
# Small and quick to start: no compilation, a cache for a few dozen short rows.
ENGINE_ARGS = {"enforce_eager": True, "max_model_len": 1024, "kv_cache_memory_bytes": 1 << 29, "max_num_seqs": 32}


def python_path(*folders: Path) -> str:
    """PYTHONPATH of a process that has these folders and counts its starts (counted_starts.py)."""
    return os.pathsep.join(map(str, (*folders, CHECKOUT / "tests/starts")))


# For a process that decodes with Model Runner V2, which GPUs have, its kernels interpreted.
RUNNER_V2 = {
    "PYTHONPATH": python_path(CHECKOUT, CHECKOUT / "tests/runner_v2/site"),
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
}


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, as `make demo` prepares it."""
    return demo.fetch("smollm2-135m-instruct", CHECKOUT / ".cache/models/smollm2-135m-instruct")


def prepared_demo_rows(model: Path, count: int, max_tokens: int) -> list[PreparedRow]:
    """The first demo rows as the engine takes them, with their regions."""
    from agd_vllm.input.reader import read_rows
    from agd_vllm.input.schema import parse_selector_option
    from agd_vllm.prompts.prepare import Preparer
    from agd_vllm.prompts.tokenizer import load_tokenizer

    preparer = Preparer(
        load_tokenizer(str(model)),
        default_roi=parse_selector_option("role=system"),
        guided=True,
        max_tokens=max_tokens,
        max_model_len=1024,
    )
    rows = [preparer.prepare(row) for row in list(read_rows([str(DEMO_ROWS)]))[:count]]
    return [PreparedRow(row.id, row.prompt_token_ids, row.roi, max_tokens) for row in rows]


def plain_vllm(
    model: Path,
    rows: Iterable[tuple[list[int], dict[str, Any]]],
    output: Path,
    steering_strengths: Sequence[float] = (),
    **engine_args: Any,
) -> list[dict[str, Any]]:
    """Greedy outputs of plain `vllm.LLM` in float32: token_ids, text, finish_reason and
    where they are asked for logprobs of each (prompt, parameters); where strengths are given, of all rows at the first,
    then at the next."""
    job = plain_job(model, rows, steering_strengths, **engine_args)
    return run_plain_jobs([job], output)[0]


def plain_job(
    model: Path,
    rows: Iterable[tuple[list[int], dict[str, Any]]],
    steering_strengths: Sequence[float] = (),
    **engine_args: Any,
) -> dict[str, Any]:
    return {
        "model": str(model),
        "engine_args": {"dtype": "float32", **ENGINE_ARGS, **engine_args},
        "rows": [{"prompt_token_ids": prompt, "params": params} for prompt, params in rows],
        "steering_strengths": steering_strengths,
    }


def run_plain_jobs(jobs: list[dict[str, Any]], output: Path) -> list[list[dict[str, Any]]]:
    """One process for all, in which each has an engine after the other."""
    asked = {"jobs": jobs, "output": str(output)}
    command = [sys.executable, str(CHECKOUT / "tests/plain_vllm.py")]
    subprocess.run(command, input=json.dumps(asked), text=True, check=True, capture_output=True, timeout=600)
    return json.loads(output.read_text())


class Chooser:
    """In the attribution pool's place: scores that a test makes up from the gate, so that it decides the selection."""

    def __init__(self, scores):
        self._scores = scores
        self.gates: dict[str, list[Gate]] = {}
        self.contexts: dict[str, list[list[int]]] = {}

    async def score(self, sequence, token_ids, roi, gate):
        self.gates.setdefault(sequence, []).append(gate)
        self.contexts.setdefault(sequence, []).append(list(token_ids))
        await asyncio.sleep(0)
        return self._scores(gate)

    def prefill(self, sequence, token_ids, roi):
        pass

    def release(self, sequence):
        pass


def first_candidate(gate: Gate) -> list[float]:
    return [1.0] + [0.0] * (len(gate.candidate_ids) - 1)


def last_candidate(gate: Gate) -> list[float]:
    return [0.0] * (len(gate.candidate_ids) - 1) + [1.0]


def vllm_workers() -> set[psutil.Process]:
    """Processes in which vLLM computes, of this process's engines."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "VLLM::Worker" in " ".join(process.cmdline()):
                found.add(process)
    return found


class EngineThread:
    """An Engine in an event loop of its own, as in a replica."""

    def __init__(self, model: Path, processors: tuple[str, ...] = (), plain: bool = False, **engine_args: Any):
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from agd_vllm.engine.engine import Engine
        from agd_vllm.engine.settings import EngineSettings
        from agd_vllm.models.inspect import inspect_model
        from agd_vllm.trace import Tracer

        self.info, self.tokenizer = inspect_model(str(model), pauses=True)
        args = {key: value for key, value in (ENGINE_ARGS | engine_args).items() if value is not None}
        settings = EngineSettings(
            dtype="float32",
            max_model_len=args.pop("max_model_len"),
            engine_args=args,
            processors=processors,
            plain=plain,
        )
        self.engine = Engine(self.info, settings, Tracer(False))
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        before = vllm_workers()
        self.run(self._start())
        # A plain engine is stepped in this process.
        (self.worker,) = vllm_workers() - before or {psutil.Process()}

    async def _start(self) -> None:
        self.engine.start()

    def run(self, coroutine, timeout: float = 300):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout)

    def decode(self, rows: list[PreparedRow], pool=None, strategy=None, seed: int = 0, **gate: float):
        """Decodes rows side by side, by AGD under a gate of these settings unless a `strategy` is given; exceptions
        come as results."""
        from agd_vllm.faults import FaultLog
        from agd_vllm.strategies.agd import Agd
        from agd_vllm.strategies.row_loop import decode_row

        strategy = strategy or Agd(**gate)
        self.faults = FaultLog()

        async def everything():
            common = (self.tokenizer, self.info.eos_ids, self.faults, strategy, seed)
            loops = (decode_row(self.engine, pool, row, *common) for row in rows)
            return await asyncio.gather(*loops, return_exceptions=True)

        return self.run(everything())

    def close(self) -> None:
        async def stop():
            self.engine.shutdown()

        self.run(stop())
        self._loop.call_soon_threadsafe(self._loop.stop)


@pytest.fixture(scope="session")
def engine(smollm2):
    thread = EngineThread(smollm2, worker_extension_cls="worker_probe.WorkerProbe")
    yield thread
    thread.close()


class TightEngine(EngineThread):
    """Hardly any room: a cache of 139 blocks of 32 tokens, which is one row of max_model_len or two of 2,000 tokens,
    six sessions, and 48 tokens a step, so that the demo's prompts of 40 to 80 are prefilled in chunks."""

    ALPHA, TOKENS_PER_STEP, SESSIONS = 0.7, 48, 6

    def __init__(self, model: Path):
        from agd_vllm.strategies.cad import Cad
        from agd_vllm.strategies.greedy import Greedy

        super().__init__(
            model,
            (*Cad(cad_alpha=self.ALPHA).processors, *Greedy(entropies=True).processors),
            max_model_len=4224,
            max_num_batched_tokens=self.TOKENS_PER_STEP,
            max_num_seqs=self.SESSIONS,
            block_size=32,
            num_gpu_blocks_override=140,
            kv_cache_memory_bytes=None,
        )


@pytest.fixture(scope="session")
def tight_engine(smollm2):
    thread = TightEngine(smollm2)
    yield thread
    thread.close()
