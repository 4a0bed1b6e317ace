"""The reference scorer in a process of its own, because lxt patches classes for a whole process.

Reads {"rule", "output", "models": {path: [request, ...]}} and writes {path: [scores, ...]}.
"""

import json
import sys

import torch
from requests_for_tiny import as_request

from agd_vllm.attribution.reference import ReferenceScorer

if __name__ == "__main__":
    torch.set_num_threads(1)  # the models are tiny: a second thread only waits
    job = json.load(sys.stdin)
    scores = {}
    for path, cases in job["models"].items():
        scorer = ReferenceScorer(path, rule=job["rule"])
        # One at a time: what padding and batches do to the oracle is another test's question.
        scores[path] = [scorer.score([as_request(case)])[0] for case in cases]
        if job.get("batched"):
            scores[f"{path} batched"] = scorer.score([as_request(case) for case in cases])
    with open(job["output"], "w") as file:
        json.dump(scores, file)
