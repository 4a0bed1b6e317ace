"""Scores by Triton's kernels, interpreted, in padded passes: in a process of its own, because Triton interprets either
all or nothing.

Reads {"output", "runs": [[path, rule, requests], ...]} and writes the scores of each run's requests.
"""

import json
import sys

import torch
from requests_for_tiny import as_request

from agd_vllm.attribution import forward, linears, operations, tangent_pass
from agd_vllm.attribution.forward import ForwardScorer
from agd_vllm.kernels import paged_attention_gpu, streams_triton

if __name__ == "__main__":
    torch.set_num_threads(1)
    job = json.load(sys.stdin)
    tangent_pass.attention_kernel = lambda *_: paged_attention_gpu
    linears._can_pack = lambda weight: False
    operations.stream_kernels = lambda *_: streams_triton
    forward.PASS_TOKENS = 32
    scores = []
    for path, rule, cases in job["runs"]:
        scorer = ForwardScorer(path, rule=rule)
        assert scorer.tangents.static.sizes == [1, 2, 4, 8, 16, 32]
        scores.append(scorer.score([as_request(case) for case in cases]))
    with open(job["output"], "w") as file:
        json.dump(scores, file)
