"""The choice where the logits are: at an open gate the candidate of the highest score becomes the argmax."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import torch

from agd_vllm.engine.channel import SOCKET_VARIABLE, TRACE_VARIABLE, EngineStep, GateSender, Guided
from agd_vllm.engine.last_words import tell_last_words
from agd_vllm.engine.orphans import ACTOR_VARIABLE, end_with_actor
from agd_vllm.inline.params import InlineParams
from agd_vllm.kernels.gate import gate
from agd_vllm.records import best_candidate


class Selection:
    """Over the rows of one batch after another. Reports guided steps, where an actor listens."""

    def __init__(self):
        path = os.environ.get(SOCKET_VARIABLE)
        self._sender = GateSender(path) if path else None
        self._traced = TRACE_VARIABLE in os.environ
        if ACTOR_VARIABLE in os.environ:
            end_with_actor()
        if self._sender:
            tell_last_words(self._sender)
        self.begin()

    def begin(self) -> None:
        """Before each forward pass."""
        self._begun = time.time()

    def apply(
        self,
        logits: torch.Tensor,
        rows: Sequence[int],
        params: Sequence[InlineParams],
        steps: Sequence[int],
        tangents: torch.Tensor,
        unembedding: torch.Tensor,
    ) -> None:
        """`logits` float32 [batch, vocabulary], changed in place for the `rows` (ascending) whose gate opens.

        `params` and `steps` (output tokens so far) of each of them; `tangents` x' [batch, d]; S(c) = u_c x'.
        """
        begun = time.time()
        guided = self._guide(logits, rows, params, tangents, unembedding) if rows else {}
        if self._sender is None:
            return
        if rows:
            self._sender.send_samples([(params[at].key, step, guided.get(at)) for at, step in enumerate(steps)])
        if self._traced:
            now = time.time()
            self._sender.send([], EngineStep(self._begun, now - self._begun, now - begun, len(logits)))

    def _guide(self, logits, rows, params, tangents, unembedding) -> dict[int, Guided]:
        """Which of the `rows`, by their place in that list, were guided, and how."""
        tau = torch.tensor([p.tau for p in params])
        min_prob = torch.tensor([p.min_prob for p in params])
        decision = gate(logits, torch.tensor(rows), tau, max(p.top_k for p in params), min_prob, None)
        opened = decision.open.nonzero().flatten()
        # Places that are not filled hold -1: any row of the unembedding will do for them.
        ids = decision.candidate_ids[opened].long()
        vectors = unembedding[ids.clamp(min=0)].float()
        scores = torch.einsum("rcd,rd->rc", vectors, tangents[torch.tensor(rows)[opened]].float())
        columns = (decision.entropy[opened], decision.candidate_count[opened], ids, decision.candidate_probs[opened])
        guided = {}
        for at, entropy, count, candidates, probs, scored in zip(
            opened.tolist(), *(column.tolist() for column in columns), scores.tolist(), strict=True
        ):
            count = min(count, params[at].top_k)
            scored = scored[:count]
            logits[rows[at], candidates[best_candidate(scored)]] = torch.finfo(logits.dtype).max
            guided[at] = (entropy, candidates[:count], probs[:count], scored)
        return guided
