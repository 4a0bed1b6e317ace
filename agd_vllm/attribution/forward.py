"""Forward-mode scoring: one cached tangent pass scores every candidate of a guided step, no backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from agd_vllm.attribution.block_pool import BLOCK_TOKENS, BlockPool, blocks_for
from agd_vllm.attribution.hf_model import load_model
from agd_vllm.attribution.regions import check_roi
from agd_vllm.attribution.tangent_cache import CachedSequence, TangentCache, prefix_digests
from agd_vllm.attribution.tangent_pass import TangentPass
from agd_vllm.models.architectures import longest_sequence
from agd_vllm.models.host import memory_bytes
from agd_vllm.records import ScoreRequest

PASS_TOKENS = 512
"""Tokens of one tangent pass, over all sequences; longer prefixes go in several, so that memory stays bounded."""


@dataclass(slots=True)
class _Job:
    """One request on its way: how many tokens of its sequence are held, by its own state or by a donor's."""

    index: int
    request: ScoreRequest
    held: int
    sequence: CachedSequence | None = None
    donor: CachedSequence | None = None
    digests: list[bytes] = field(default_factory=list)

    @property
    def num_blocks(self) -> int:
        return blocks_for(self.request.start + len(self.request.token_ids))


class ForwardScorer:
    """Scores candidates by forward-mode AttnLRP (the rules of `agd_vllm.attribution.rules`), with a tangent cache.

    Stateful: a request may carry only the tokens since the last one of its sequence, under the same region.
    `cache_bytes` (default: an eighth of the device's memory) are taken for keys, values and tangents, in blocks;
    a sequence that needs more has blocks of its own while it is scored. The least recently used sequences go first.
    A sequence has at most `max_model_len` tokens (default: what the model is made for).
    `loading`: dtype, device, revision, trust_remote_code and overrides of `load_model`. Raises ValueError for a model
    it cannot read.
    """

    stateful = True

    def __init__(
        self,
        model_path: str,
        *,
        rule: str = "attnlrp",
        cache_bytes: int | None = None,
        max_model_len: int | None = None,
        **loading: Any,
    ):
        self.hf = load_model(model_path, **loading)
        self.max_model_len = max_model_len or longest_sequence(self.hf.config)
        self.tangents = TangentPass(self.hf, rule, PASS_TOKENS, self.max_model_len)
        self.make_cache(default_cache_bytes(self.hf.device) if cache_bytes is None else cache_bytes)

    def make_cache(self, num_bytes: int) -> None:
        """An empty cache of that size in the place of any that there is; on a GPU passes over it are captured."""
        self.cache = None
        self.tangents.static.forget()
        self.cache = TangentCache(self.tangents.shape, num_bytes)
        self.cache_tokens = self.cache.pool.num_blocks * BLOCK_TOKENS
        self.tangents.capture(self.cache.pool)

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest]) -> list[list[float] | None]:
        """S(c, R) for each request's candidates, in their order; NaN is passed on as it is.

        None: the tokens before the request's `start` are not held, or not under its region; send the whole sequence.
        Raises ValueError, before anything is computed, for a region outside the tokens or the model, and for more
        tokens than `max_model_len`.
        """
        for request in requests:
            num_tokens = request.start + len(request.token_ids)
            if num_tokens == 0:
                raise ValueError(f"sequence {request.sequence}: nothing to score, it has no tokens")
            if num_tokens > self.max_model_len:
                raise ValueError(
                    f"sequence {request.sequence}: {num_tokens} tokens, the attribution worker takes at most "
                    f"{self.max_model_len}; raise --max-model-len, or shorten the row"
                )
            check_roi(request.roi, num_tokens=num_tokens, num_layers=self.hf.num_layers, num_heads=self.hf.num_heads)
        answers: list[list[float] | None] = [None] * len(requests)
        waiting = list(range(len(requests)))
        while waiting:
            jobs, waiting = self._next_jobs(requests, waiting)
            if not jobs:  # none of them can be resumed
                break
            for job, scores in zip(jobs, self._run(jobs), strict=True):
                answers[job.index] = scores
        return answers

    def release(self, sequence: str) -> None:
        """The sequence is finished: it stays only while there is room, for those that begin alike."""
        self.cache.release(sequence)

    def discard(self, sequence: str) -> None:
        """Nothing is held of the sequence any longer."""
        self.cache.discard(sequence)

    def _next_jobs(self, requests: Sequence[ScoreRequest], waiting: Sequence[int]) -> tuple[list[_Job], list[int]]:
        """The requests that can run in one batch now, and those that must wait; those that cannot be resumed leave.

        A request waits for a sequence of the batch that begins as it does (whose blocks it then shares), for another
        request of its own sequence, or for room. One that the whole cache has no room for goes alone.
        """
        jobs: list[_Job] = []
        later: list[int] = []
        names: set[str] = set()
        coming: set[bytes] = set()
        num_blocks, room = 0, self.cache.pool.num_blocks
        for index in waiting:
            request = requests[index]
            if request.sequence in names:
                later.append(index)
                continue
            job = self._plan(index, request)
            if job is None:
                continue
            shared = BLOCK_TOKENS * sum(digest in coming for digest in job.digests)
            if jobs and (shared > job.held or num_blocks + job.num_blocks > room):
                later.append(index)
                continue
            num_blocks += job.num_blocks
            names.add(request.sequence)
            coming.update(job.digests)
            jobs.append(job)
        return jobs, later

    def _plan(self, index: int, request: ScoreRequest) -> _Job | None:
        """How the request can be served; None if the tokens before its `start` are not held under its region, or if
        there is no room to hold them any longer."""
        sequence = self.cache.get(request.sequence)
        if sequence is not None and sequence.roi != request.roi:
            sequence = None
        if request.start > (sequence.length if sequence else 0):
            return None
        num_tokens = request.start + len(request.token_ids)
        if blocks_for(num_tokens) > self.cache.pool.num_blocks:
            return None if request.start else _Job(index, request, held=0)
        # The last token is always computed, for its hidden state.
        if sequence is None:
            digests = prefix_digests(request.token_ids, request.roi)
            donor, held = self.cache.donor(digests[: (num_tokens - 1) // BLOCK_TOKENS])
            return _Job(index, request, held, donor=donor, digests=digests)
        held = request.start + _common_length(sequence.tokens[request.start :], request.token_ids)
        return _Job(index, request, min(held, sequence.length, num_tokens - 1), sequence=sequence)

    def _run(self, jobs: Sequence[_Job]) -> list[list[float]]:
        """Bring every job's sequence up to its last token and score its candidates."""
        if jobs[0].num_blocks > self.cache.pool.num_blocks:
            return self._run_beside_the_cache(jobs[0])
        # New sequences share their prefixes before others are cut back or replaced: a donor may be one of those.
        new = [job for job in jobs if job.sequence is None]
        for job in new:
            job.sequence = CachedSequence(job.request.roi)
            if job.donor is not None:
                self.cache.share(job.sequence, job.donor, job.held)
        for job in new:
            self.cache.add(job.request.sequence, job.sequence)
        for job in jobs:
            self.cache.truncate(job.sequence, job.held)
            job.sequence.tokens[job.request.start :] = job.request.token_ids
        pinned = [job.sequence for job in jobs]
        for job in jobs:
            self.cache.grow(job.sequence, len(job.sequence.tokens), pinned)
        scores = self._extend(jobs, self.cache.pool)
        for job in new:
            self.cache.index(job.sequence, job.digests)
        return scores

    def _run_beside_the_cache(self, job: _Job) -> list[list[float]]:
        """In blocks that are made for this call and not kept."""
        self.cache.discard(job.request.sequence)
        pool = BlockPool(self.cache.shape, job.num_blocks)
        job.sequence = CachedSequence(job.request.roi, list(job.request.token_ids), blocks=pool.take(job.num_blocks))
        return self._extend([job], pool)

    def _extend(self, jobs: Sequence[_Job], pool: BlockPool) -> list[list[float]]:
        """Compute what the jobs' sequences lack, PASS_TOKENS at a time; the scores of each one's candidates."""
        scored: list[_Job] = []
        parts: list[torch.Tensor] = []
        unfinished = list(jobs)
        while unfinished:
            segments, candidates, room = [], [], PASS_TOKENS
            for job in unfinished:
                lacking = len(job.sequence.tokens) - job.sequence.length
                count = min(lacking, room)
                if count == 0:
                    break
                segments.append((job.sequence, count))
                room -= count
                if count == lacking:
                    scored.append(job)
                candidates.append(job.request.candidate_ids if count == lacking else ())
            parts.append(self.tangents.extend(segments, pool, candidates))
            unfinished = [job for job in unfinished if job.sequence.length < len(job.sequence.tokens)]
        numbers = iter(torch.cat(parts).tolist())
        of_job = {job.index: [next(numbers) for _ in job.request.candidate_ids] for job in scored}
        return [of_job[job.index] for job in jobs]


def default_cache_bytes(device: torch.device) -> int:
    """An eighth of the device's memory, of a machine what a container may use of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 8
    return memory_bytes() // 8


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Of the common prefix of two token lists."""
    end = min(len(one), len(other))
    return next((position for position in range(end) if one[position] != other[position]), end)
