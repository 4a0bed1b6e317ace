"""The paper's AGD loop, literally: Transformers forward, lxt backward, argmax, one row and one step after another.

Runs in a process of its own, because lxt patches classes for a whole process. Reads a job and writes the loop's view of
every step as JSON. Where the loop would take another token than the given output, it notes so and goes on with the
given one, so that every later step is still compared.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM

from agd_vllm.attribution.lxt_compat import patch


def next_step(model, ids: list[int], spans, tau: float, top_k: int, min_prob: float) -> dict:
    embeddings = model.get_input_embeddings()(torch.tensor([ids])).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, use_cache=False).logits[0, -1].float()
    probs = logits.detach().softmax(-1)
    entropy = float(torch.special.entr(probs).sum())
    top = probs.topk(top_k + 1)
    candidates = [int(i) for i, p in zip(top.indices[:top_k], top.values, strict=False) if p >= min_prob]
    step = {
        "entropy": entropy,
        "top_ids": top.indices.tolist(),
        "top_probs": top.values.tolist(),
        "logit_gap": float(logits.detach()[top.indices[0]] - logits.detach()[top.indices[1]]),
        "gated": entropy >= tau and len(candidates) > 1,
    }
    if not step["gated"]:
        return step | {"choice": int(top.indices[0])}
    scores = []
    for candidate in candidates:
        (gradient,) = torch.autograd.grad(logits[candidate], embeddings, retain_graph=True)
        relevance = (gradient * embeddings.detach()).sum(-1)[0]
        scores.append(sum(weight * float(relevance[start:end].sum()) for start, end, weight in spans))
    best = max(range(len(scores)), key=scores.__getitem__)
    return step | {"candidates": candidates, "scores": scores, "choice": candidates[best]}


if __name__ == "__main__":
    job = json.load(sys.stdin)
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float32, attn_implementation=patch("LlamaForCausalLM", "attnlrp")
    )
    model.requires_grad_(False)
    for row in job["rows"]:
        ids, row["loop"] = list(row["prompt_token_ids"]), []
        for token in row["token_ids"]:
            row["loop"].append(next_step(model, ids, row["spans"], row["tau"], job["top_k"], job["min_prob"]))
            ids.append(token)
    with open(job["output"], "w") as file:
        json.dump(job["rows"], file)
