"""What Transformers 4.51.3's own DoLa picked (picks.json), with the inputs rebuilt from their seeds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

RECORDED: dict[str, Any] = json.loads(Path(__file__).with_name("picks.json").read_text())
# Where two choices lie closer than this another order of sums may take the other one.
NEAR = 1e-4


def logits(case: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Final [V] and early [E, V] of one pick."""
    vocabulary, exits, width, scale = case["V"], case["E"], case["d"], case["scale"]
    generator = torch.Generator().manual_seed(case["seed"])

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    if width:
        unembedding, final, early = draw(vocabulary, width), draw(width), draw(exits, width)
    else:
        final, early = scale * draw(vocabulary), scale * draw(exits, vocabulary)
    if case["near"]:
        share = torch.sigmoid(draw(exits))[:, None]
        sharpness = torch.exp(0.5 * draw(exits))[:, None]
        early = sharpness * (share * final + torch.sqrt(1 - share * share) * early)
    if width:
        factor = scale / math.sqrt(width)
        final, early = factor * (unembedding @ final), factor * (early @ unembedding.T)
    assert torch.allclose(torch.stack([final[0], early[-1, -1]]), torch.tensor(case["probe"]), atol=1e-3)
    return final, early


def model(entry: dict[str, Any]) -> LlamaForCausalLM:
    """The tiny Llama of one entry of `generations`, float32."""
    llama = LlamaForCausalLM(LlamaConfig(**entry["config"])).float().eval()
    parameters = dict(llama.named_parameters())
    generator = torch.Generator().manual_seed(entry["seed"])
    scales = {"model.embed_tokens.weight": entry["std_embed"], "lm_head.weight": entry["std_head"]}
    with torch.no_grad():
        for name in sorted(parameters):
            drawn = torch.randn(parameters[name].shape, generator=generator)
            norm = name.endswith("norm.weight")
            parameters[name].copy_(1 + 0.1 * drawn if norm else scales.get(name, entry["std_layer"]) * drawn)
    first = llama.model.layers[7].self_attn.v_proj.weight.flatten()[:2]
    assert torch.allclose(first, torch.tensor(entry["probe"]), atol=1e-3)
    return llama
