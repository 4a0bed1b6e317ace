"""The paper's loop at its fairest, one row after another: Transformers and lxt, no vLLM.

A plain step is one step with a KV cache. A guided step runs one forward with its graph over the whole sequence, shared
by one lxt backward for each candidate. Runs in a process of its own, because lxt patches classes for the whole process:

    python -m benchmarks.paper < JOB.json

JOB holds model, dtype, tau, top_k, min_prob, seconds and rows [{prompt_token_ids, max_tokens, eos_ids, spans}]; for
each row that ends in time a line of JSON is printed: tokens, guided, seconds.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from agd_vllm.attribution.lxt_compat import patch


class PaperLoop:
    def __init__(self, model: str, dtype: str, tau: float, top_k: int, min_prob: float):
        architecture = AutoConfig.from_pretrained(model).architectures[0]
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation=patch(architecture, "attnlrp")
        ).to(self._device)
        self._model.requires_grad_(False)
        self._tau, self._top_k, self._min_prob = tau, top_k, min_prob

    def decode(self, row: dict[str, Any], deadline: float) -> dict[str, float] | None:
        """Tokens, guided steps and seconds of a row; None where the deadline came first."""
        begun = time.perf_counter()
        ids, cache, fresh = list(row["prompt_token_ids"]), DynamicCache(), row["prompt_token_ids"]
        tokens = guided = 0
        while tokens < row["max_tokens"]:
            if time.monotonic() > deadline:
                return None
            with torch.inference_mode():
                inputs = torch.tensor([fresh], device=self._device)
                logits = self._model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
            probs = logits.float().softmax(-1)
            top = probs.topk(self._top_k)
            candidates = [int(i) for i, p in zip(top.indices, top.values, strict=True) if p >= self._min_prob]
            token = int(top.indices[0])
            if float(torch.special.entr(probs).sum()) >= self._tau and len(candidates) > 1:
                guided += 1
                token = self._most_relevant(ids, candidates, row["spans"])
            tokens += 1
            ids.append(token)
            fresh = [token]
            if token in row["eos_ids"]:
                break
        return {"tokens": tokens, "guided": guided, "seconds": time.perf_counter() - begun}

    def _most_relevant(self, ids: list[int], candidates: list[int], spans: list[list]) -> int:
        inputs = torch.tensor([ids], device=self._device)
        embeddings = self._model.get_input_embeddings()(inputs).detach().requires_grad_()
        logits = self._model(inputs_embeds=embeddings, use_cache=False, logits_to_keep=1).logits[0, -1]
        scores = []
        for candidate in candidates:
            (gradient,) = torch.autograd.grad(logits[candidate], embeddings, retain_graph=True)
            relevance = (gradient * embeddings.detach()).float().sum(-1)[0]
            scores.append(sum(weight * float(relevance[start:end].sum()) for start, end, weight in spans))
        return candidates[max(range(len(scores)), key=scores.__getitem__)]


def main() -> None:
    job = json.load(sys.stdin)
    loop = PaperLoop(job["model"], job["dtype"], job["tau"], job["top_k"], job["min_prob"])
    deadline = time.monotonic() + job["seconds"]
    for row in job["rows"]:
        done = loop.decode(row, deadline)
        if done is None:
            break
        print(json.dumps(done), flush=True)


if __name__ == "__main__":
    main()
