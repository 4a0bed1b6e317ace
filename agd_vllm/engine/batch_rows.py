"""Rows of vLLM's batch that carry an extra argument of ours, as logits processors follow them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from vllm import SamplingParams

from agd_vllm.input.named_once import NamedTwice, parse_json


class BatchRow(msgspec.Struct):
    """A row of vLLM's batch with the lists of its tokens, which vLLM keeps."""

    params: Any  # of the request; `prompt_len` among them is the length of its row's original prompt
    context_len: int  # prompt as vLLM sees it: after a resume it holds earlier outputs too
    context_ids: list[int]  # vLLM's own list, which may grow beyond that
    output_ids: list[int]  # vLLM's own running list

    def step(self) -> int:
        """Output tokens of the row before the one that is sampled now."""
        return self.context_len + len(self.output_ids) - self.params.prompt_len

    def token_ids(self) -> list[int]:
        """Prompt and output so far."""
        return self.context_ids[: self.context_len] + self.output_ids


def checked_params(sampling_params: SamplingParams, name: str, kind: type) -> Any:
    """`extra_args[name]` as a `kind`, None where the request has none. HTTP sends JSON text, Arrow whole numbers as
    floats: both are read. Raises ValueError for anything else."""
    params = (sampling_params.extra_args or {}).get(name)
    if params is None:
        return None
    try:
        params = msgspec.convert(_from_json(params), kind, strict=False)
    except (msgspec.DecodeError, NamedTwice, RecursionError) as error:
        raise ValueError(f"extra_args[{name!r}]: {error}") from error
    if sampling_params.temperature != 0:
        raise ValueError(f"a request with extra_args[{name!r}] must be greedy (temperature 0)")
    return params


def _from_json(params: Any) -> Any:
    """`params`, or a list in it, may be JSON text."""
    if isinstance(params, str):
        decoded = msgspec.json.decode(params)
        parse_json(params)  # msgspec takes the last of two values of a key; this refuses them
        params = decoded
    if not isinstance(params, dict):
        return params
    return {
        key: msgspec.json.decode(value) if isinstance(value, str) and value.startswith("[") else value
        for key, value in params.items()
    }


def new_row(name: str, kind: type) -> Callable[[SamplingParams, list[int] | None, list[int]], BatchRow | None]:
    """For vLLM's `process_dict_updates`: follows the requests with `extra_args[name]`."""

    def make(params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]) -> BatchRow | None:
        found = checked_params(params, name, kind)
        if found is None:
            return None
        context_ids = prompt_ids or []
        return BatchRow(found, len(context_ids), context_ids, output_ids)

    return make
