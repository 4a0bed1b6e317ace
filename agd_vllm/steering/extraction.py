"""Steering vectors from pairs: by attribution (GrAInS), by contrast of states (CAA), and a random one as a control."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedTokenizerFast

from agd_vllm.attribution.hf_model import HFModel
from agd_vllm.attribution.integrated_gradients import IntegratedGradients
from agd_vllm.steering.pairs import Pair

METHODS = ("grains", "caa", "random")
# Tokens of each sign that are taken out (arXiv 2507.18043, k).
TOP = 10
BATCH_TOKENS = 4096
"""Padded tokens of one forward pass without a graph."""

Vectors = dict[int, torch.Tensor]
Progress = Callable[[Sequence[Pair]], Iterable[Pair]]


def extract(
    method: str,
    gradients: IntegratedGradients,
    pairs: Sequence[Pair],
    layers: Sequence[int],
    *,
    pad_id: int,
    seed: int,
    progress: Progress,
) -> Vectors:
    """The vector [d], float32, for the stream that leaves each of `layers`; `progress` goes through the pairs.

    `grains` (arXiv 2507.18043): integrated gradients of log p(preferred) - log p(dispreferred) name the TOP most
    positive and most negative of the prompt's own tokens; v is the mean, over pairs, of what the positive ones add to
    the state at the prompt's last position minus what the negative ones add, each set being replaced by `pad_id` to
    see the state without it. `caa` (arXiv 2312.06681): the mean of the states at the last token of prompt and preferred
    answer minus those of the dispreferred. `random`: of a normal distribution by `seed`, as long as `caa`'s.
    Raises ValueError where the pairs make no difference in a layer.
    """
    if method == "grains":
        vectors = _grains(gradients, pairs, layers, pad_id, progress)
    else:
        vectors = _caa(gradients.hf, pairs, layers, progress)
    for layer, vector in vectors.items():
        if not vector.any():  # nothing was taken out
            raise ValueError(f"the pairs make no difference in layer {layer}; give prompts with words of their own")
    return _random(vectors, seed) if method == "random" else vectors


def pad_token(tokenizer: PreTrainedTokenizerFast) -> int:
    """What takes the place of tokens that are taken out; the end of text where the tokenizer names no padding."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ValueError("the tokenizer names neither a pad token nor an EOS token to put in place of others; name one")


def _grains(
    gradients: IntegratedGradients, pairs: Sequence[Pair], layers: Sequence[int], pad_id: int, progress: Progress
) -> Vectors:
    without_negative, without_positive = [], []
    for pair in progress(pairs):
        contrast = contribution(gradients, pair)
        ranked = sorted(pair.own, key=lambda position: contrast[position].item())
        negative = [position for position in ranked[:TOP] if contrast[position] < 0]
        positive = [position for position in ranked[-TOP:] if contrast[position] > 0]
        without_negative.append(_without(pair.prompt, negative, pad_id))
        without_positive.append(_without(pair.prompt, positive, pad_id))
    # (state - state without positive) - (state - state without negative): the state itself drops out of the mean.
    return _mean_difference(gradients.hf, without_negative, without_positive, layers)


def contribution(gradients: IntegratedGradients, pair: Pair) -> torch.Tensor:
    """Integrated gradients of log p(preferred) - log p(dispreferred), float32 [prompt]: exactly the difference of two,
    because both go through the same inputs."""
    preferred, dispreferred = (gradients.answer(pair.prompt, ids) for ids in (pair.preferred, pair.dispreferred))
    return preferred.tokens - dispreferred.tokens


def _without(prompt: list[int], positions: list[int], pad_id: int) -> list[int]:
    return [pad_id if at in positions else token for at, token in enumerate(prompt)]


def _caa(hf: HFModel, pairs: Sequence[Pair], layers: Sequence[int], progress: Progress) -> Vectors:
    answered = [([*pair.prompt, *pair.preferred], [*pair.prompt, *pair.dispreferred]) for pair in progress(pairs)]
    preferred, dispreferred = (list(part) for part in zip(*answered, strict=True))
    return _mean_difference(hf, preferred, dispreferred, layers)


def _random(like: Vectors, seed: int) -> Vectors:
    generator = torch.Generator().manual_seed(seed)
    drawn = {layer: torch.randn(len(vector), generator=generator) for layer, vector in like.items()}
    return {layer: vector * (like[layer].norm() / vector.norm()) for layer, vector in drawn.items()}


def _mean_difference(
    hf: HFModel, first: list[list[int]], second: list[list[int]], layers: Sequence[int]
) -> dict[int, torch.Tensor]:
    states = last_states(hf, [*first, *second], layers)
    return {layer: (found[: len(first)] - found[len(first) :]).mean(0) for layer, found in states.items()}


@torch.inference_mode()
def last_states(hf: HFModel, sequences: Sequence[list[int]], layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """Layer to the streams that leave it at each sequence's last token, float32 [sequences, d] on the CPU."""
    found = {layer: torch.empty(len(sequences), hf.config.hidden_size) for layer in sorted(layers)}
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    with _streams(hf, found) as streams:
        while order:
            longest = len(sequences[order[-1]])
            batch = [order.pop() for _ in range(min(len(order), max(1, BATCH_TOKENS // longest)))]
            lengths = torch.tensor([len(sequences[index]) for index in batch])
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            for row, index in enumerate(batch):
                ids[row, : lengths[row]] = torch.tensor(sequences[index])
            mask = (torch.arange(longest) < lengths[:, None]).long()
            hf.stack(input_ids=ids.to(hf.device), attention_mask=mask.to(hf.device), use_cache=False)
            for layer, stream in streams.items():
                found[layer][batch] = stream[torch.arange(len(batch)), lengths.to(hf.device) - 1].float().cpu()
    return found


@contextmanager
def _streams(hf: HFModel, layers: Iterable[int]):
    """While open, what leaves each layer in the last forward pass, [B, T, d]."""
    streams: dict[int, torch.Tensor] = {}
    hooks = [
        hf.stack.layers[layer].register_forward_hook(
            lambda _module, _inputs, output, layer=layer: streams.__setitem__(layer, output)
        )
        for layer in layers
    ]
    try:
        yield streams
    finally:
        for hook in hooks:
            hook.remove()
