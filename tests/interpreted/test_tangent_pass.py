"""The whole tangent pass by Triton's kernels in the place of a CPU's: prefill in chunks, then cached steps."""

import sys
from pathlib import Path

import pytest
import torch

from agd_vllm.attribution import forward, tangent_pass
from agd_vllm.attribution.forward import ForwardScorer
from agd_vllm.attribution.operations import FusedOperations
from agd_vllm.kernels import paged_attention_gpu, streams_triton
from agd_vllm.records import Roi, ScoreRequest, Span

sys.path.append(str(Path(__file__).parent.parent / "attribution"))
import tiny


@pytest.mark.parametrize(("name", "rule"), [("llama-3", "cplrp"), ("gemma3", "attnlrp")])
def test_scores_are_those_of_the_other_kernels(tmp_path, monkeypatch, name, rule):
    model = str(tiny.save(name, tmp_path))
    monkeypatch.setattr(forward, "PASS_TOKENS", 16)
    expected = ForwardScorer(model, rule=rule)
    monkeypatch.setattr(tangent_pass, "operations", lambda _hf, *model: FusedOperations(*model, streams_triton))
    scorer = ForwardScorer(model, rule=rule)
    scorer.tangents.kernel = paged_attention_gpu
    torch.manual_seed(0)
    rows = torch.randint(3, tiny.VOCABULARY, (2, 22)).tolist()
    roi = Roi((Span(2, 9), Span(12, 15, -0.5)))
    for start, end in ((0, 20), (20, 22)):
        requests = [
            ScoreRequest(f"{row}", start, ids[start : end - row * (start > 0)], roi, (5, 6, 7))
            for row, ids in enumerate(rows)
        ]
        ours, theirs = (torch.tensor(each.score(requests)) for each in (scorer, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
