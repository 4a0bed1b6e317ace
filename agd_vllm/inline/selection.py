"""The choice where the logits are: at an open gate the candidate of the highest score becomes the argmax."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from agd_vllm.engine.channel import SOCKET_VARIABLE, TRACE_VARIABLE, EngineStep, GateSender, Sample
from agd_vllm.engine.gate_reports import Deliver, report_sender
from agd_vllm.engine.orphans import ACTOR_VARIABLE, end_with_actor
from agd_vllm.inline.params import InlineParams
from agd_vllm.kernels.gate import gate
from agd_vllm.kernels.to_device import to_device


class Choice(NamedTuple):
    """What came of the rows with a region, in their order: whether the gate opened [R], entropy in nats [R], how many
    candidates there are [R], and their ids, probabilities and scores [R, top_k], the rest of which is anything."""

    open: torch.Tensor
    entropy: torch.Tensor
    count: torch.Tensor
    candidate_ids: torch.Tensor
    candidate_probs: torch.Tensor
    scores: torch.Tensor


class Selection:
    """Over the rows of one batch after another: `begin` before each forward pass, `set_rows` whenever other rows have a
    region or they lie elsewhere, `apply` on the logits. Reports guided steps, where an actor listens. On a GPU nothing
    waits for the result."""

    def __init__(self, device: torch.device):
        self._device = device
        path = os.environ.get(SOCKET_VARIABLE)
        self._reports: Deliver | None = None
        if path:
            self._reports = report_sender(sample_reports(GateSender(path)), device)
        self._traced = TRACE_VARIABLE in os.environ
        if ACTOR_VARIABLE in os.environ:
            end_with_actor()
        self.set_rows([], [])
        self.begin()

    def begin(self) -> None:
        self._begun = time.time()

    def set_rows(self, rows: Sequence[int], params: Sequence[InlineParams]) -> None:
        """`rows` of the logits have a region, in ascending order, each with its `params`."""
        self._params = list(params)
        self._rows = self._column(rows, torch.int64)
        self._tau = self._column([p.tau for p in params], torch.float32)
        self._min_prob = self._column([p.min_prob for p in params], torch.float32)
        self._top_k = self._column([p.top_k for p in params], torch.int32)
        self._most = max((p.top_k for p in params), default=0)

    def _column(self, values: Sequence, dtype: torch.dtype) -> torch.Tensor:
        return to_device(torch.tensor(values, dtype=dtype), self._device)

    def apply(
        self, logits: torch.Tensor, steps: Sequence[int | None], tangents: torch.Tensor, unembedding: torch.Tensor
    ) -> None:
        """`logits` float32 [batch, vocabulary], changed in place for rows with a region whose gate opens.

        `steps`: output tokens of each of these rows so far, None where vLLM throws the sample away; `tangents` x'
        [batch, d]; S(c) = u_c x'.
        """
        begun = time.time()
        choice = self._choose(logits, tangents, unembedding) if self._params else None
        if self._reports is None:
            return
        step = None
        if self._traced:
            now = time.time()
            step = EngineStep(self._begun, now - self._begun, now - begun, len(logits))
        if choice is not None or step is not None:
            self._reports(choice, self._params, steps, step)

    def _choose(self, logits: torch.Tensor, tangents: torch.Tensor, unembedding: torch.Tensor) -> Choice:
        decision = gate(logits, self._rows, self._tau, self._most, self._min_prob, None)
        # Places that are not filled hold -1: any row of the unembedding will do for them.
        ids = decision.candidate_ids.long()
        vectors = unembedding[ids.clamp(min=0)].float()
        scores = torch.einsum("rcd,rd->rc", vectors, tangents[self._rows].float())
        count = torch.minimum(decision.candidate_count, self._top_k)
        candidate = torch.arange(self._most, device=self._device) < count[:, None]
        # As `records.best_candidate`: the first of the highest, the greedy token where a score is NaN.
        among = scores.masked_fill(~candidate, float("-inf"))
        best = torch.where(among.isnan().any(-1), 0, among.argmax(-1))
        chosen = ids.gather(1, best[:, None])[:, 0].clamp(min=0)
        highest = torch.finfo(logits.dtype).max
        logits[self._rows, chosen] = torch.where(decision.open, highest, logits[self._rows, chosen])
        return Choice(decision.open, decision.entropy, count, ids, decision.candidate_probs, scores)


def sample_reports(sender: GateSender) -> Deliver:
    """Sends every sample that vLLM keeps, guided or not: a gap in their numbers shows that one was lost."""

    def deliver(choice, params, steps, step) -> None:
        if choice is not None:
            sender.send_samples(_samples(choice, params, steps))
        if step is not None:
            sender.send([], step)

    return deliver


def _samples(choice: Choice, params: Sequence[InlineParams], steps: Sequence[int | None]) -> list[Sample]:
    samples = []
    for row, *columns in zip(params, steps, *(column.tolist() for column in choice), strict=True):
        step, opened, entropy, count, ids, probs, scores = columns
        if step is not None:
            guided = (entropy, ids[:count], probs[:count], scores[:count]) if opened else None
            samples.append((row.key, step, guided))
    return samples
