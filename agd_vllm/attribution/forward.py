"""Forward-mode scoring: one cached tangent pass scores every candidate of a guided step, no backward pass."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from agd_vllm.attribution.hf_model import load_model
from agd_vllm.attribution.regions import check_roi
from agd_vllm.attribution.tangent_cache import (
    PREFIX_BLOCK,
    CachedSequence,
    CacheShape,
    TangentCache,
    prefix_digests,
)
from agd_vllm.attribution.tangent_pass import TangentPass
from agd_vllm.kernels.to_device import to_device
from agd_vllm.records import ScoreRequest

PASS_TOKENS = 512
"""Tokens of one tangent pass, over all sequences; longer prefixes go in several, so that memory stays bounded."""


@dataclass(slots=True)
class _Job:
    """One request on its way: its whole sequence, how much of it is held, by its own state or by a donor's."""

    index: int
    request: ScoreRequest
    tokens: list[int]
    held: int
    sequence: CachedSequence | None = None
    donor: CachedSequence | None = None
    digests: list[bytes] = field(default_factory=list)


class ForwardScorer:
    """Scores candidates by forward-mode AttnLRP (the rules of `agd_vllm.attribution.rules`), with a tangent cache.

    Stateful: a request may carry only the tokens since the last one of its sequence, under the same region.
    `cache_bytes` (default: an eighth of the device's memory) bounds the keys, values and tangents held between calls;
    one sequence may exceed it while it is scored. The least recently used sequences go first. `loading`: dtype, device,
    revision and trust_remote_code of `load_model`. Raises ValueError for a model it cannot read.
    """

    stateful = True

    def __init__(
        self,
        model_path: str,
        *,
        rule: str = "attnlrp",
        cache_bytes: int | None = None,
        **loading: Any,
    ):
        self.hf = load_model(model_path, **loading)
        self.tangents = TangentPass(self.hf, rule)
        shape = CacheShape(
            num_layers=self.hf.num_layers,
            num_kv_heads=self.hf.num_kv_heads,
            head_dim=self.hf.head_dim,
            key_tangents=self.tangents.key_tangents,
            dtype=self.tangents.cache_dtype,
            device=self.hf.device,
        )
        if cache_bytes is None:
            cache_bytes = default_cache_bytes(self.hf.device)
        self.cache = TangentCache(shape, cache_bytes)
        self.cache_tokens = cache_bytes // shape.token_bytes

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest]) -> list[list[float] | None]:
        """S(c, R) for each request's candidates, in their order; NaN is passed on as it is.

        None: the tokens before the request's `start` are not held, or not under its region; send the whole sequence.
        Raises ValueError, before anything is computed, for a region outside the tokens or the model.
        """
        for request in requests:
            num_tokens = request.start + len(request.token_ids)
            if num_tokens == 0:
                raise ValueError(f"sequence {request.sequence}: nothing to score, it has no tokens")
            check_roi(request.roi, num_tokens=num_tokens, num_layers=self.hf.num_layers, num_heads=self.hf.num_heads)
        answers: list[list[float] | None] = [None] * len(requests)
        waiting = list(range(len(requests)))
        while waiting:
            jobs, waiting = self._next_jobs(requests, waiting)
            if not jobs:  # none of them can be resumed
                break
            for job, scores in zip(jobs, self._run(jobs), strict=True):
                answers[job.index] = scores
        self.cache.evict(0)
        return answers

    def release(self, sequence: str) -> None:
        """The sequence is finished: it stays only while there is room, for those that begin alike."""
        self.cache.release(sequence)

    def _next_jobs(self, requests: Sequence[ScoreRequest], waiting: Sequence[int]) -> tuple[list[_Job], list[int]]:
        """The requests that can run in one batch now, and those that must wait; those that cannot be resumed leave.

        A request waits for a sequence of the batch that begins as it does (the prefix is then copied, not computed
        twice), for another request of its own sequence, or for room.
        """
        jobs: list[_Job] = []
        later: list[int] = []
        names: set[str] = set()
        coming: set[bytes] = set()
        num_bytes = 0
        for index in waiting:
            request = requests[index]
            if request.sequence in names:
                later.append(index)
                continue
            job = self._plan(index, request)
            if job is None:
                continue
            needed = len(job.tokens) * self.cache.shape.token_bytes
            shared = PREFIX_BLOCK * sum(digest in coming for digest in job.digests)
            if jobs and (shared > job.held or num_bytes + needed > self.cache.max_bytes):
                later.append(index)
                continue
            num_bytes += needed
            names.add(request.sequence)
            coming.update(job.digests)
            jobs.append(job)
        return jobs, later

    def _plan(self, index: int, request: ScoreRequest) -> _Job | None:
        """How the request can be served; None if the tokens before its `start` are not held under its region."""
        sequence = self.cache.get(request.sequence)
        if sequence is not None and sequence.roi != request.roi:
            sequence = None
        if request.start > (sequence.length if sequence else 0):
            return None
        if sequence is None:
            tokens = list(request.token_ids)
            digests = prefix_digests(tokens, request.roi)
            # The last token is always computed, for its hidden state.
            donor, held = self.cache.donor(digests[: (len(tokens) - 1) // PREFIX_BLOCK])
            return _Job(index, request, tokens, held, donor=donor, digests=digests)
        tokens = sequence.tokens[: request.start] + request.token_ids
        held = _common_prefix(sequence.tokens, tokens, request.start)
        return _Job(index, request, tokens, min(held, sequence.length, len(tokens) - 1), sequence=sequence)

    def _run(self, jobs: Sequence[_Job]) -> list[list[float]]:
        """Bring every job's sequence up to its last token and score its candidates."""
        pinned = [sequence for job in jobs for sequence in (job.sequence, job.donor) if sequence is not None]
        # New sequences copy their prefixes before the others are cut back: a donor may be one of those.
        for job in sorted(jobs, key=lambda job: job.sequence is not None):
            if job.sequence is None:
                job.sequence = CachedSequence(self.cache.shape, job.request.roi)
                self.cache.add(job.request.sequence, job.sequence)
                pinned.append(job.sequence)
            self.cache.truncate(job.sequence, job.held)
            job.sequence.tokens = job.tokens
            self.cache.grow(job.sequence, len(job.tokens), pinned)
            if job.donor is not None:
                job.sequence.copy_prefix(job.donor, job.held)
        last = self._extend(jobs)
        for job in jobs:
            if job.digests:
                self.cache.index(job.sequence, job.digests)
        candidates = [candidate for job in jobs for candidate in job.request.candidate_ids]
        counts = [len(job.request.candidate_ids) for job in jobs]
        rows = to_device(torch.repeat_interleave(torch.arange(len(jobs)), torch.tensor(counts)), self.hf.device)
        ids = to_device(torch.tensor(candidates, dtype=torch.long), self.hf.device)
        unembedding = self.hf.unembedding[ids].float()
        scores = torch.einsum("rd,rd->r", last[1, rows], unembedding).cpu()
        return [per_job.tolist() for per_job in scores.split(counts)]

    def _extend(self, jobs: Sequence[_Job]) -> torch.Tensor:
        """Compute what the jobs' sequences lack, PASS_TOKENS at a time; streams [2, jobs, d] at their last tokens."""
        last: list[torch.Tensor | None] = [None] * len(jobs)
        unfinished = list(range(len(jobs)))
        while unfinished:
            segments, room = [], PASS_TOKENS
            for number in unfinished:
                sequence = jobs[number].sequence
                count = min(len(sequence.tokens) - sequence.length, room)
                if count:
                    segments.append((sequence, count))
                    room -= count
            streams = self.tangents.extend(segments)
            for row, number in enumerate(unfinished[: len(segments)]):
                last[number] = streams[:, row]
            unfinished = [
                number for number in unfinished if jobs[number].sequence.length < len(jobs[number].sequence.tokens)
            ]
        return torch.stack(last, dim=1)


def default_cache_bytes(device: torch.device) -> int:
    """An eighth of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 8
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8


def _common_prefix(held: Sequence[int], tokens: Sequence[int], start: int) -> int:
    """Length of the common prefix of two token lists that agree on the first `start` tokens."""
    end = min(len(held), len(tokens))
    return next((position for position in range(start, end) if held[position] != tokens[position]), end)
