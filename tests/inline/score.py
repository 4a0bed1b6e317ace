"""Scores of vLLM's own model class with tangents: reads {"rule", "output", "kernels", "chunks", "models": {path:
[request, ...]}} and writes {path: [scores, ...]}, all requests of a chunk size before those of the next.

`kernels`: "compiled", "none", or "triton", interpreted: those of a GPU (with Model Runner V2)."""

import json
import sys
from pathlib import Path

import torch
from inline_model import InlineModel
from requests_for_tiny import as_request

from agd_vllm.kernels import compiled

if __name__ == "__main__":
    job = json.load(sys.stdin)
    if job["kernels"] != "compiled":
        compiled.available = lambda: False
    if job["kernels"] == "triton":
        from agd_vllm.attribution import operations
        from agd_vllm.inline import attention
        from agd_vllm.kernels import paged_attention_gpu, streams_triton

        attention.kernel = lambda device, head_dim: paged_attention_gpu
        operations.stream_kernels = lambda *_: streams_triton
    torch.set_num_threads(1)  # the models are tiny: a second thread only waits
    answers = {}
    for path, cases in job["models"].items():
        model, requests = InlineModel(path, job["rule"]), [as_request(case) for case in cases]
        sequences = [(request.token_ids, request.roi) for request in requests]
        candidates = [{len(request.token_ids): request.candidate_ids} for request in requests]
        answers[path] = [
            scores[len(request.token_ids)]
            for chunk in job["chunks"]
            for request, scores in zip(requests, model.scores(sequences, candidates, chunk), strict=True)
        ]
    Path(job["output"]).write_text(json.dumps(answers))
