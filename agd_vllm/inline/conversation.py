"""AGD in anybody's script: a conversation and its region as what `vllm.LLM.generate` takes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast
from vllm import SamplingParams
from vllm.inputs import TokensPrompt

from agd_vllm.inline.params import inline_params_of
from agd_vllm.input.schema import parse_row
from agd_vllm.prompts.prepare import Preparer

_keys = itertools.count()


def request(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[dict[str, str]],
    roi: Sequence[dict[str, Any]],
    *,
    tau: float = 1.734,
    top_k: int = 5,
    min_prob: float = 0.05,
    max_tokens: int = 256,
    rule: str = "attnlrp",
    key: int | None = None,
) -> tuple[TokensPrompt, SamplingParams]:
    """Prompt and parameters of one row; messages and selectors as in the input file, `rule` the engine's.

    `key` names the row in reports of its steps (`agd_vllm.engine.channel`). Raises RowRefused or ValueError for what
    cannot be decoded.
    """
    row = parse_row({"id": "request", "messages": list(messages), "roi": list(roi), "max_tokens": max_tokens}, line=1)
    prepared = _preparer(tokenizer).prepare(row)
    params = inline_params_of(prepared.roi, next(_keys) if key is None else key, rule, tau, top_k, min_prob)
    prompt = TokensPrompt(prompt_token_ids=prepared.prompt_token_ids, cache_salt=params.salt)
    return prompt, SamplingParams(temperature=0.0, max_tokens=max_tokens, extra_args=params.as_extra_args())


@functools.lru_cache
def _preparer(tokenizer: PreTrainedTokenizerFast) -> Preparer:
    return Preparer(tokenizer, default_roi=None, guided=True, max_tokens=1)
