"""The model classes that vLLM is given, by `model_class_overrides`, in the place of its own."""

from __future__ import annotations

import torch
from vllm.config import VllmConfig

from agd_vllm.dola.arguments import CONFIG
from agd_vllm.dola.contrast import dola_scores
from agd_vllm.models.architectures import DOLA
from agd_vllm.models.class_overrides import vllm_classes

# Elements of a [rows, vocabulary] matrix at a time: the contrast holds a few of them in float32.
MAX_ELEMENTS = 1 << 26


class EarlyExits:
    """Comes before a causal language model of vLLM's, whose streams and unembedding it uses.

    `forward` gives the normed stream of the last layer and the streams of the candidate layers side by side,
    [N, (1 + E) d]: whatever rows vLLM takes of it, `compute_logits` has them all. Early exits have no final norm, as in
    the published implementations.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        settings = vllm_config.additional_config[CONFIG]
        self._relative_top: float = settings["relative_top"]
        self.set_aux_hidden_state_layers(tuple(settings["layers"]))

    def forward(self, *args, **kwargs) -> torch.Tensor:
        final, early = super().forward(*args, **kwargs)
        return torch.cat([final, *early], dim=-1)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        width = self.config.hidden_size
        rows = max(1, MAX_ELEMENTS // self.config.vocab_size)
        scores = []
        for part in hidden_states.split(rows):
            final, *early = (stream.contiguous() for stream in part.split(width, dim=-1))
            logits = super().compute_logits(final)
            # With tensor parallelism one rank samples; all take part in each unembedding.
            exits = [super(EarlyExits, self).compute_logits(stream) for stream in early]
            if logits is not None:
                scores.append(dola_scores(logits, exits, self._relative_top))
        return torch.cat(scores) if scores else None


globals().update(vllm_classes(DOLA, EarlyExits, __name__))
