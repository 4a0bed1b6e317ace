"""The model classes that vLLM is given, by `model_class_overrides`, in the place of its own."""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import VllmConfig

from agd_vllm.models.architectures import STEER
from agd_vllm.models.class_overrides import vllm_classes
from agd_vllm.steering.arguments import CONFIG
from agd_vllm.steering.rule import steered
from agd_vllm.steering.vector_file import read_vectors


class Steered:
    """Comes before a causal language model of vLLM's, whose layers it hooks: in its constructor, before anything is
    compiled."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        settings = vllm_config.additional_config[CONFIG]
        vectors = read_vectors(settings["file"])
        if vectors.digest != settings["digest"]:
            raise ValueError(f"--steering {settings['file']}: the file has changed since the run began; run again")
        device = next(self.parameters()).device
        self._steering = {number: vector.to(device) for number, vector in vectors.layers.items()}
        for number, vector in self._steering.items():
            _steer(self.model.layers[number], torch.zeros_like(vector), settings["norm"])

    @torch.inference_mode()
    def set_steering_strength(self, strength: float) -> None:
        """In place, where a compiled model and a CUDA graph read it; 0 until then."""
        for number, vector in self._steering.items():
            self.model.layers[number].steering_offset.copy_(strength * vector)


def _steer(layer: nn.Module, offset: torch.Tensor, norm: bool) -> None:
    layer.register_buffer("steering_offset", offset, persistent=False)

    def hook(layer: nn.Module, _inputs: tuple, output: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        # A layer of vLLM's gives its stream as a sum of two, and the next one adds them.
        hidden, residual = output
        stream = steered(hidden.float() + residual.float(), layer.steering_offset, norm)
        # All of it in one: taking the residual off again would round in bfloat16.
        return stream.to(hidden.dtype), torch.zeros_like(residual)

    layer.register_forward_hook(hook)


globals().update(vllm_classes(STEER, Steered, __name__))
