"""What vLLM reads from this process's environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from agd_vllm.engine.orphans import ACTOR_VARIABLE

IN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"
RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
# vLLM's names of it.
FLOAT32 = ("float32", "float")


def on_cpu() -> bool:
    """Whether this machine has no GPU that torch can use."""
    import torch

    return not torch.cuda.is_available()


def runs_v1() -> bool:
    """Whether vLLM takes Model Runner V1 here, as on every CPU that it is not told otherwise on."""
    return on_cpu() and os.environ.get(RUNNER) != "1"


def set_environment(cores: list[int] | None, dtype: str, ranks: int = 1) -> None:
    """vLLM reads these when it is imported or when its worker starts; what the user has set wins. `cores`: those of its
    threads, None leaves them to vLLM. `dtype`: as vLLM's argument. `ranks`: workers of the engine, which share the
    cores; with fewer cores than ranks they share each."""
    if on_cpu():
        # Model Runner V2 needs a GPU's Triton.
        os.environ.setdefault(RUNNER, "0")
    if dtype in FLOAT32 and not on_cpu():
        # vLLM's attention for float32 is Triton's, whose products name no precision: TF32 unless told otherwise.
        os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ[ACTOR_VARIABLE] = f"{os.getpid()}"
    if cores is not None:
        shares = [cores[rank::ranks] or cores for rank in range(ranks)]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, own)) for own in shares))


@contextmanager
def in_this_process() -> Iterator[None]:
    """vLLM plans for an engine that is stepped by its caller."""
    before = os.environ.get(IN_PROCESS)
    os.environ[IN_PROCESS] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[IN_PROCESS]
        else:
            os.environ[IN_PROCESS] = before
