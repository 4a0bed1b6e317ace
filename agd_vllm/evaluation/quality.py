"""Proxies for the quality of generated text: how likely the model finds it, and how much it repeats itself."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from agd_vllm.models.config_overrides import read_config

NGRAM = 4
MAX_BATCH_TOKENS = 2048
"""Padded tokens of the answers in one forward pass; their logits over a vocabulary of 49,152 take 400 MB in float32."""

Text = tuple[Sequence[int], Sequence[int]]


def repetition_rate(token_ids: Sequence[int]) -> float:
    """The share of 4-grams that have occurred before in the same text: seq-rep-4 of arXiv 1908.04319."""
    ngrams = [tuple(token_ids[i : i + NGRAM]) for i in range(len(token_ids) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


class PerplexityModel:
    """The Hugging Face copy of the model, loaded once.

    `dtype` as asked for, auto: as the checkpoint's. `overrides` as for `read_config`.
    """

    def __init__(
        self,
        path: str,
        *,
        dtype: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        overrides: Mapping[str, Any] | None = None,
    ):
        source = {"revision": revision, "trust_remote_code": trust_remote_code}
        config = read_config(path, overrides=overrides, **source)
        self._model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype, **source)
        self._model.requires_grad_(False).eval().to("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> str:
        return str(self._model.dtype).removeprefix("torch.")

    @torch.inference_mode()
    def perplexities(self, texts: Mapping[str, Sequence[Text]]) -> dict[str, float | None]:
        """By name: exp of the mean negative log probability (nats) of all generated tokens, given what stands before.

        `texts`: (prompt token ids, generated token ids). Every token counts once, the one that ends a text too; the
        softmax is taken in float32. None where nothing was generated. A prompt is computed once for all its answers.
        """
        answers: defaultdict[tuple[int, ...], list[tuple[str, Sequence[int]]]] = defaultdict(list)
        for name, of_name in texts.items():
            for prompt, generated in of_name:
                if generated:
                    answers[tuple(prompt)].append((name, generated))
        loss, tokens = dict.fromkeys(texts, 0.0), dict.fromkeys(texts, 0)
        for prompt, of_prompt in answers.items():
            prefix = self._prefix(prompt[:-1])
            for batch in _batches(of_prompt):
                for (name, generated), nll in zip(batch, self._losses(prefix, prompt[-1], batch), strict=True):
                    loss[name] += nll
                    tokens[name] += len(generated)
        return {name: math.exp(loss[name] / tokens[name]) if tokens[name] else None for name in texts}

    def _prefix(self, token_ids: Sequence[int]) -> DynamicCache:
        cache = DynamicCache(config=self._model.config)
        if token_ids:
            ids = torch.tensor([token_ids], device=self._model.device)
            self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def _losses(self, prefix: DynamicCache, last: int, answers: Sequence[tuple[str, Sequence[int]]]) -> list[float]:
        """The negative log probability of each answer after the prefix and the prompt's last token."""
        longest = max(len(generated) for _, generated in answers)
        ids = torch.full((len(answers), longest), last)
        targets = torch.full((len(answers), longest), -100)
        for row, (_, generated) in enumerate(answers):
            targets[row, : len(generated)] = torch.tensor(generated)
            ids[row, 1 : len(generated)] = torch.tensor(generated[:-1])
        cache = copy.deepcopy(prefix)
        if cache.get_seq_length():
            cache.batch_repeat_interleave(len(answers))
        # Padding follows the text, and no token attends to what follows it: no mask is needed.
        logits = self._model(ids.to(self._model.device), past_key_values=cache, use_cache=True).logits.float()
        targets = targets.to(self._model.device)
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return nll.view(targets.shape).sum(1).tolist()


def _batches(answers: Sequence[tuple[str, Sequence[int]]]) -> Iterator[list[tuple[str, Sequence[int]]]]:
    """Answers of similar length together, at most MAX_BATCH_TOKENS with their padding (or one answer)."""
    batch: list[tuple[str, Sequence[int]]] = []
    for answer in sorted(answers, key=lambda answer: -len(answer[1])):
        if batch and (len(batch) + 1) * len(batch[0][1]) > MAX_BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(answer)
    if batch:
        yield batch
