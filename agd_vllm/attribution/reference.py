"""The reference scorer: AttnLRP by reverse mode with lxt's rules, one backward pass per candidate.

It is slow (a whole forward with graph and k backward passes per guided step), needs nothing but autograd, and is the
oracle that forward mode is tested against. It is also the one way to get the relevance of every token at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from agd_vllm.attribution import lxt_compat
from agd_vllm.attribution.hf_model import load_config, load_model
from agd_vllm.attribution.regions import check_roi, heads_by_layer, token_weights
from agd_vllm.records import ScoreRequest

MAX_BATCH_TOKENS = 2048
"""Padded tokens of one graph. Its activations take about 1.6 MB a token for a 135M model in float32."""


class Relevance(NamedTuple):
    """The logit of one target token and the relevance of each input token, prompt and output, up to its position."""

    logit: float
    tokens: list[float]


class ReferenceScorer:
    """Scores candidates by reverse mode (arXiv 2402.05602); rule attnlrp, cplrp, or ixg for plain gradient x input.

    lxt patches classes of the process, so a process holds scorers of one rule only (RuntimeError otherwise).
    """

    stateful = False
    cache_tokens = None

    def __init__(
        self,
        model_path: str,
        *,
        rule: str = "attnlrp",
        dtype: str = "float32",
        device: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        overrides: Mapping[str, Any] | None = None,
    ):
        source = {"revision": revision, "trust_remote_code": trust_remote_code, "overrides": overrides}
        architecture, _ = load_config(model_path, **source)
        implementation = lxt_compat.patch(architecture, rule)
        self.hf = load_model(
            model_path,
            dtype=dtype,
            device=device,
            attn_implementation=implementation,
            **source,
        )

    def score(self, requests: Sequence[ScoreRequest]) -> list[list[float]]:
        """S(c, R) for each request's candidates, in their order; NaN is passed on as it is.

        Requests carry whole sequences (`start` 0). Raises ValueError for a region outside the tokens or the model.
        """
        for request in requests:
            if request.start != 0:
                raise ValueError(f"sequence {request.sequence}: the reference scorer keeps no state, start must be 0")
            check_roi(
                request.roi,
                num_tokens=len(request.token_ids),
                num_layers=self.hf.num_layers,
                num_heads=self.hf.num_heads,
            )
        scores: list[list[float]] = [[] for _ in requests]
        for indices in _batches([len(request.token_ids) for request in requests]):
            batch = self._score_batch([requests[index] for index in indices])
            for index, row in zip(indices, batch, strict=True):
                scores[index] = row
        return scores

    def release(self, sequence: str) -> None:
        """Nothing to forget: this scorer keeps no state."""

    def relevance(self, token_ids: Sequence[int], targets: Sequence[tuple[int, int]]) -> list[Relevance]:
        """Relevance of every input token for several targets of one sequence: one forward, one backward each.

        A target is (position, token id): the logit of that token id as the model predicts it after the token at
        `position`. Its relevance covers the tokens 0 to `position`, summed over the embedding dimensions
        (arXiv 2402.05602, eq. 5).
        """
        ids = torch.tensor([token_ids], device=self.hf.device)
        embeddings, hidden = self._forward(ids, torch.ones_like(ids))
        results = []
        for number, (position, target) in enumerate(targets, start=1):
            logit = hidden[0, position].float() @ self.hf.unembedding[target].float()
            (gradient,) = torch.autograd.grad(logit, embeddings, retain_graph=number < len(targets))
            relevance = (gradient[0].float() * embeddings[0].float()).sum(-1)
            results.append(Relevance(logit.item(), relevance[: position + 1].tolist()))
        return results

    def head_relevance(self, token_ids: Sequence[int], targets: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Positive relevance of every attention head for all targets together, float32 [layers, heads] on the CPU.

        Targets are (position, token id) as in `relevance`; what is explained is the sum of their logits, in one
        backward pass. R_h = sum over positions i and dimensions k of max(R(z_i^h)_k, 0), with z^h the head's output
        before the output projection (arXiv 2505.15807).
        """
        ids = torch.tensor([token_ids], device=self.hf.device)
        with self._head_outputs(set(range(self.hf.num_layers))) as outputs:
            _, hidden = self._forward(ids, torch.ones_like(ids))
        positions, tokens = zip(*targets, strict=True)
        logits = (hidden[0, list(positions)].float() * self.hf.unembedding[list(tokens)].float()).sum()
        layers = [outputs[layer] for layer in range(self.hf.num_layers)]
        relevance = [
            (gradient.float() * output.float())[0].clamp(min=0).unflatten(-1, (self.hf.num_heads, -1)).sum((0, 2))
            for output, gradient in zip(layers, torch.autograd.grad(logits, layers), strict=True)
        ]
        return torch.stack(relevance).detach().cpu()

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (the leaf of the graph) and last hidden states after the final norm, both [B, T, d]."""
        embeddings = self.hf.stack.embed_tokens(ids).detach().requires_grad_()
        output = self.hf.stack(inputs_embeds=embeddings, attention_mask=mask, use_cache=False)
        return embeddings, output.last_hidden_state

    @contextmanager
    def _head_outputs(self, layers: set[int]) -> Iterator[dict[int, torch.Tensor]]:
        """While open, records what enters `o_proj` of `layers`: the heads' outputs side by side, [B, T, H * D]."""
        outputs: dict[int, torch.Tensor] = {}
        hooks = [
            self.hf.stack.layers[layer].self_attn.o_proj.register_forward_pre_hook(
                lambda _module, inputs, layer=layer: outputs.__setitem__(layer, inputs[0])
            )
            for layer in sorted(layers)
        ]
        try:
            yield outputs
        finally:
            for hook in hooks:
                hook.remove()

    def _score_batch(self, requests: Sequence[ScoreRequest]) -> list[list[float]]:
        """One padded forward with graph and one backward pass per candidate rank, both shared by the batch."""
        lengths = torch.tensor([len(request.token_ids) for request in requests])
        padded = (len(requests), int(lengths.max()))
        ids, weights = torch.zeros(padded, dtype=torch.long), torch.zeros(padded)
        for row, request in enumerate(requests):
            length = len(request.token_ids)
            ids[row, :length] = torch.tensor(request.token_ids)
            weights[row, :length] = token_weights(request.roi, 0, length)
        mask = (torch.arange(padded[1]) < lengths[:, None]).long()
        device = self.hf.device
        ids, mask, weights = ids.to(device), mask.to(device), weights.to(device)

        head_weights = self._head_weights(requests)
        with self._head_outputs(set(head_weights)) as head_outputs:
            embeddings, hidden = self._forward(ids, mask)
        last = hidden[torch.arange(len(requests), device=device), lengths.to(device) - 1].float()

        scores: list[list[float]] = [[] for _ in requests]
        ranks = max((len(request.candidate_ids) for request in requests), default=0)
        for rank in range(ranks):
            rows = [row for row, request in enumerate(requests) if rank < len(request.candidate_ids)]
            candidates = [requests[row].candidate_ids[rank] for row in rows]
            logits = (last[rows] * self.hf.unembedding[candidates].float()).sum()
            gradients = torch.autograd.grad(logits, [embeddings, *head_outputs.values()], retain_graph=rank + 1 < ranks)
            relevance = (gradients[0].float() * embeddings.float()).sum(-1)
            totals = (weights * relevance).sum(-1)
            for (layer, output), gradient in zip(head_outputs.items(), gradients[1:], strict=True):
                per_head = (gradient.float() * output.float()).unflatten(-1, (self.hf.num_heads, -1)).sum((1, 3))
                totals = totals + (head_weights[layer] * per_head).sum(-1)
            totals = totals.tolist()
            for row in rows:
                scores[row].append(totals[row])
        return scores

    def _head_weights(self, requests: Sequence[ScoreRequest]) -> dict[int, torch.Tensor]:
        """Layer to the membership of its heads in each request's region, float32 [B, H]."""
        weights: dict[int, torch.Tensor] = {}
        for row, request in enumerate(requests):
            for layer, heads in heads_by_layer(request.roi).items():
                if layer not in weights:
                    weights[layer] = torch.zeros(len(requests), self.hf.num_heads, device=self.hf.device)
                weights[layer][row, heads] = 1.0
        return weights


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices grouped so that a padded batch holds at most MAX_BATCH_TOKENS (or one sequence), long ones first."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > MAX_BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
