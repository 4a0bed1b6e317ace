"""The Ray actor that holds one Hugging Face copy of the model and scores batches of gated steps."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from agd_vllm.attribution.batch_bounds import BatchBounds, bounds_by_cost, time_calls
from agd_vllm.records import ScoreRequest

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class AttributionSettings:
    """What a worker is started with. `scorer` is `forward` or `lxt`, `rule` is `attnlrp`, `cplrp` or `ixg`,
    for `lxt` `ig` too.

    `cores`: the CPU cores that it runs on (CPU only; None leaves it to torch). `gpu_share`: its part of a GPU, 0
    without one. `max_model_len`: tokens of the longest row (None: what the model is made for). `overrides`: changes of
    the model's configuration, as for `read_config`.
    """

    scorer: str
    rule: str
    dtype: str
    cores: list[int] | None = None
    gpu_share: float = 0
    max_model_len: int | None = None
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """`stateful` and `cache_tokens` of the worker's scorer, and how much it is to be sent at once."""

    stateful: bool
    cache_tokens: int | None
    bounds: BatchBounds = field(default_factory=BatchBounds)


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """Scores in the order of the requests (None asks for the whole sequence), and when and how long it took."""

    scores: list[list[float] | None]
    begun: float
    seconds: float


class WorkerRelevance(NamedTuple):
    """As `Relevance` of the reference scorer, `tokens` as a float32 array, which travels well."""

    logit: float
    tokens: np.ndarray


class AttributionWorker:
    """A plain class; the pipeline makes it a Ray actor. One call at a time."""

    def __init__(self, model: str, revision: str | None, trust_remote_code: bool, settings: AttributionSettings):
        if settings.cores is not None:
            os.sched_setaffinity(0, settings.cores)
            # Said to torch, not by OMP_NUM_THREADS: a preloaded OpenMP (vLLM preloads one for its children) reads that
            # before this line runs, and two threads on one core spin for each other.
            import torch

            torch.set_num_threads(len(settings.cores))
        cache_bytes = None
        if settings.gpu_share:
            # What a pass needs beside the cache comes and goes, in many sizes. torch reads this when it first asks for
            # memory.
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
            cache_bytes = _cache_bytes(model, revision, trust_remote_code, settings)
        from agd_vllm.attribution.scorer import load_scorer

        self._scorer = load_scorer(
            settings.scorer,
            model,
            rule=settings.rule,
            dtype=settings.dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            overrides=settings.overrides,
            cache_bytes=cache_bytes,
            max_model_len=settings.max_model_len,
        )
        # On a CPU, where a pass costs in proportion from a few tokens on, the defaults are right.
        timed = settings.gpu_share and self._scorer.stateful
        self._bounds = bounds_by_cost(time_calls(self._scorer)) if timed else BatchBounds()

    def info(self) -> WorkerInfo:
        """Answers once the model is loaded."""
        return WorkerInfo(self._scorer.stateful, self._scorer.cache_tokens, self._bounds)

    def score(self, requests: Sequence[ScoreRequest], released: Sequence[str]) -> ScoredBatch:
        """Scores a batch; `released` sequences have ended."""
        begun = time.time()
        for sequence in released:
            self._scorer.release(sequence)
        with _ended_by_gpu_errors():
            scores = self._scorer.score(requests)
        return ScoredBatch(scores, begun, time.time() - begun)

    def relevance(self, token_ids: Sequence[int], targets: Sequence[tuple[int, int]]) -> list[WorkerRelevance]:
        """As `ReferenceScorer.relevance`; only where the worker's scorer is `lxt`."""
        with _ended_by_gpu_errors():
            relevances = self._scorer.relevance(token_ids, targets)
        import numpy as np  # as torch, which brings it along

        return [WorkerRelevance(found.logit, np.array(found.tokens, np.float32)) for found in relevances]


@contextmanager
def _ended_by_gpu_errors() -> Iterator[None]:
    # Imported by now; at the top of this file it would be imported before the cores are said.
    import torch

    try:
        yield
    except RuntimeError as error:
        # Triton launches its kernels past torch, and has no class for what the GPU says to that.
        if not isinstance(error, torch.AcceleratorError) and not str(error).startswith("Triton Error [CUDA]"):
            raise
        # A GPU's error stays with the process: every later call would fail. Ray starts another one.
        logging.getLogger("agd_vllm").exception("the GPU failed; the attribution worker ends")
        os._exit(1)


def _cache_bytes(model: str, revision: str | None, trust_remote_code: bool, settings: AttributionSettings) -> int:
    """What the worker's share of the GPU, or what others left of it, has for the tangent cache.

    Raises RuntimeError with one line where it is too small.
    """
    import torch

    from agd_vllm.attribution.block_pool import BLOCK_TOKENS
    from agd_vllm.attribution.hf_model import load_config, weight_dtype
    from agd_vllm.attribution.static_pass import SIZES
    from agd_vllm.models.architectures import longest_sequence
    from agd_vllm.models.gpu_memory import CACHE_PART, LEAST_CACHE_BYTES, check_room, worker_needs

    source = {"revision": revision, "trust_remote_code": trust_remote_code, "overrides": settings.overrides}
    _, config = load_config(model, **source)
    free, total = torch.cuda.mem_get_info()
    longest = settings.max_model_len or longest_sequence(config.get_text_config())
    needs = worker_needs(config, weight_dtype(settings.dtype, config), SIZES, longest, BLOCK_TOKENS)
    # Reverse mode keeps no cache, and is the reference rather than what is run at scale.
    least = {"least tangent cache": LEAST_CACHE_BYTES} if settings.scorer == "forward" else {}
    remedies = "take --attribution-dtype bfloat16, fewer --attribution-workers or --engines"
    if free < settings.gpu_share * total:
        remedies += ", a lower --engine-arg gpu_memory_utilization"
    room = min(free, int(settings.gpu_share * total))
    check_room("an attribution worker", needs | least, room, total, f"{remedies}, or more GPUs")
    return int(CACHE_PART * (room - sum(needs.values())))
