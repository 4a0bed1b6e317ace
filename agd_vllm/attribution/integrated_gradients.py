"""Integrated gradients (arXiv 1703.01365): the gradient times the input, on the way from a zero input to it.

Gradients are those of the untouched model. What is integrated over is the input embeddings, scaled from 0 to 1, by
Gauss and Legendre's rule of POINTS points, which captum takes too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from agd_vllm.attribution import lxt_compat
from agd_vllm.attribution.hf_model import load_config, load_model
from agd_vllm.attribution.reference import MAX_BATCH_TOKENS, Relevance

POINTS = 20


class ExplainedAnswer(NamedTuple):
    """The log-probability of an answer, and the part of each token of its prompt in it."""

    log_probability: float
    tokens: torch.Tensor


class IntegratedGradients:
    """Rule `ig` of `attribute`. Keeps no state, and has no scores: a guided step would take POINTS passes.

    A process that attributes by lxt's rules cannot hold one (RuntimeError): they patch its classes.
    """

    stateful = False
    cache_tokens = None

    def __init__(
        self,
        model_path: str,
        *,
        dtype: str = "float32",
        device: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        overrides: Mapping[str, Any] | None = None,
    ):
        source = {"revision": revision, "trust_remote_code": trust_remote_code, "overrides": overrides}
        architecture, _ = load_config(model_path, **source)
        self.hf = load_model(
            model_path,
            dtype=dtype,
            device=device,
            attn_implementation=lxt_compat.patch(architecture, "ixg"),
            **source,
        )

    def relevance(self, token_ids: Sequence[int], targets: Sequence[tuple[int, int]]) -> list[Relevance]:
        """As `ReferenceScorer.relevance`: of every input token, for the logits of (position, token id)."""
        positions, tokens = (list(part) for part in zip(*targets, strict=True))

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            return (hidden[:, positions].float() * self.hf.unembedding[tokens].float()).sum(-1)

        values, parts = self._integrate(token_ids, len(token_ids), logits)
        return [
            Relevance(value, part[: position + 1].tolist())
            for value, part, position in zip(values.tolist(), parts, positions, strict=True)
        ]

    def answer(self, prompt: Sequence[int], answer: Sequence[int]) -> ExplainedAnswer:
        """What the prompt's tokens add to log p(answer | prompt), float32 [len(prompt)] on the CPU.

        The embeddings of the prompt are scaled, those of the answer are not: two answers to one prompt are explained
        by way of the same inputs, and their difference by the difference of the two.
        """
        ids = torch.tensor(answer, device=self.hf.device)
        first = len(prompt) - 1

        def log_probability(hidden: torch.Tensor) -> torch.Tensor:
            logits = hidden[:, first : first + len(ids)] @ self.hf.unembedding.T
            return logits.float().log_softmax(-1)[:, torch.arange(len(ids)), ids].sum(-1, keepdim=True)

        values, parts = self._integrate([*prompt, *answer], len(prompt), log_probability)
        return ExplainedAnswer(values.item(), parts[0])

    def _integrate(
        self, token_ids: Sequence[int], scaled: int, outputs: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Values [N] of `outputs` (last hidden states [B, T, d] to [B, N]) at the input itself, and their integrated
        gradients [N, scaled] for its first `scaled` tokens."""
        ids = torch.tensor([token_ids], device=self.hf.device)
        embeddings = self.hf.stack.embed_tokens(ids).detach()
        with torch.no_grad():
            values = outputs(self._hidden(embeddings))[0].cpu()
        parts = torch.zeros(len(values), scaled)
        points, weights = (part.to(self.hf.device) for part in _points())
        batch = max(1, MAX_BATCH_TOKENS // len(token_ids))
        for scales, shares in zip(points.split(batch), weights.split(batch), strict=True):
            inputs = embeddings.repeat(len(scales), 1, 1)
            inputs[:, :scaled] *= scales[:, None, None].to(inputs.dtype)
            inputs.requires_grad_()
            found = outputs(self._hidden(inputs))
            for number in range(found.shape[1]):
                (gradient,) = torch.autograd.grad(
                    (shares * found[:, number]).sum(), inputs, retain_graph=number + 1 < found.shape[1]
                )
                products = gradient.float().sum(0)[:scaled] * embeddings[0, :scaled].float()
                parts[number] += products.sum(-1).cpu()
        return values, parts

    def _hidden(self, embeddings: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        return self.hf.stack(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).last_hidden_state


def _points() -> tuple[torch.Tensor, torch.Tensor]:
    """Points in (0, 1) and their weights, which add up to 1; float32."""
    points, weights = np.polynomial.legendre.leggauss(POINTS)
    return torch.tensor((points + 1) / 2).float(), torch.tensor(weights / 2).float()
