"""Proxies for the quality of generated text: how likely the model finds it, and how much it repeats itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

NGRAM = 4
MAX_BATCH_TOKENS = 2048
"""Padded tokens of one forward pass; their logits over a vocabulary of 49,152 take 400 MB in float32."""


def repetition_rate(token_ids: Sequence[int]) -> float:
    """The share of 4-grams that have occurred before in the same text: seq-rep-4 of arXiv 1908.04319."""
    ngrams = [tuple(token_ids[i : i + NGRAM]) for i in range(len(token_ids) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


class PerplexityModel:
    """The Hugging Face copy of the model, loaded once; `dtype` as asked for, auto: as the checkpoint's."""

    def __init__(self, path: str, *, dtype: str = "auto", revision: str | None = None, trust_remote_code: bool = False):
        self._model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
        )
        self._model.requires_grad_(False).eval().to("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> str:
        return str(self._model.dtype).removeprefix("torch.")

    def perplexity(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> float | None:
        """exp of the mean negative log probability (nats) of all generated tokens, given what stands before them.

        `texts`: (prompt token ids, generated token ids). Every token counts once, the one that ends a text too; the
        softmax is taken in float32. None where nothing was generated.
        """
        loss, tokens = 0.0, sum(len(generated) for _, generated in texts)
        for batch in _batches(texts):
            loss += self._loss(batch)
        return math.exp(loss / tokens) if tokens else None

    def _loss(self, batch: Sequence[tuple[Sequence[int], Sequence[int]]]) -> float:
        lengths = [len(prompt) + len(generated) for prompt, generated in batch]
        ids = torch.zeros(len(batch), max(lengths), dtype=torch.long)
        targets = torch.full_like(ids, -100)
        for row, (prompt, generated) in enumerate(batch):
            ids[row, : lengths[row]] = torch.tensor([*prompt, *generated])
            targets[row, len(prompt) : lengths[row]] = torch.tensor(generated)
        # Padding follows the text, and no token attends to what follows it: no mask is needed.
        first = min(len(prompt) for prompt, _ in batch) - 1
        kept = torch.arange(first, ids.shape[1] - 1, device=self._model.device)
        logits = self._model(ids.to(self._model.device), logits_to_keep=kept, use_cache=False).logits.float()
        targets = targets[:, first + 1 :].to(self._model.device)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()


def _batches(texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[list]:
    """Texts of similar length together, at most MAX_BATCH_TOKENS with their padding (or one text)."""
    batch: list = []
    for text in sorted((text for text in texts if text[1]), key=lambda text: -len(text[0]) - len(text[1])):
        longest = sum(map(len, batch[0] if batch else text))
        if batch and (len(batch) + 1) * longest > MAX_BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch
