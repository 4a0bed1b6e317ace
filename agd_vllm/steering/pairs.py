"""Rows with two answers each, of which one is preferred: what steering vectors are made of."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from transformers import PreTrainedTokenizerFast

from agd_vllm.input.reader import check_inputs, read_rows
from agd_vllm.prompts.prepare import Preparer
from agd_vllm.prompts.template import Rendered
from agd_vllm.prompts.tokenizer import Tokens
from agd_vllm.records import InputRow, RowError, RowRefused

KEYS = ("preferred", "dispreferred")


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with its answers, as tokens. `own`: the positions in the prompt of the row's own words, which leaves out
    what the chat template adds."""

    prompt: list[int]
    own: list[int]
    preferred: list[int]
    dispreferred: list[int]


def read_pairs(
    inputs: Sequence[str], limit: int | None, tokenizer: PreTrainedTokenizerFast, max_model_len: int
) -> list[Pair]:
    """Every row of the inputs, whose metadata is {"preferred": text, "dispreferred": text}, as a pair.

    Raises ValueError, in one line, for a row that is none, and InputUnusable for an input that cannot be read.
    """
    check_inputs(inputs)
    preparer = Preparer(
        tokenizer, default_roi=None, guided=False, max_tokens=1, max_model_len=max_model_len, date=datetime.now()
    )
    pairs = []
    for row in itertools.islice(read_rows(inputs), limit):
        place = f"row {row.id!r} (line {row.line} of {row.file})"
        if isinstance(row, RowError):
            raise ValueError(f"{place}: {row.message}")
        try:
            pairs.append(_pair(row, preparer, tokenizer, max_model_len))
        except RowRefused as refused:
            raise ValueError(f"{place}: {refused}") from refused
    return pairs


def _pair(row: InputRow, preparer: Preparer, tokenizer: PreTrainedTokenizerFast, max_model_len: int) -> Pair:
    metadata = json.loads(row.metadata)
    answers = [metadata.get(key) if isinstance(metadata, dict) else None for key in KEYS]
    if not all(isinstance(answer, str) and answer for answer in answers):
        raise RowRefused("pair", "no pair; its metadata must hold two texts, preferred and dispreferred")
    # A row is data: no text of its answers is a special token.
    ids = [tokenizer(answer, add_special_tokens=False, split_special_tokens=True)["input_ids"] for answer in answers]
    if ids[0] == ids[1]:
        raise RowRefused("pair", "preferred and dispreferred are alike; give two answers that differ, or leave it out")
    preparer.prepare(row)  # refuses what is too long, or no token of the model
    rendered, tokens = preparer.encode(row)
    longest = len(tokens.ids) + max(map(len, ids))
    if longest > max_model_len:
        raise RowRefused("pair", f"prompt and answer have {longest} tokens, the model takes {max_model_len}")
    return Pair(tokens.ids, _own(rendered, tokens), *ids)


def _own(rendered: Rendered, tokens: Tokens) -> list[int]:
    places = [place for of_message in rendered.places for place in of_message]
    return [
        index
        for index, (start, end) in enumerate(tokens.offsets)
        if any(max(start, place.start) < min(end, place.end) for place in places)
    ]
