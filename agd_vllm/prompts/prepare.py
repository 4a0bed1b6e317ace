"""Input rows to prepared rows: run defaults, prompt tokens, region and limits, or the reason why a row cannot run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerFast

from agd_vllm.prompts.emphasis import emphasized
from agd_vllm.prompts.roi import region
from agd_vllm.prompts.template import ChatTemplate, Rendered, raw_prompt
from agd_vllm.prompts.tokenizer import ChatTokenizer, Tokens
from agd_vllm.records import InputRow, PreparedRow, Roi, RowRefused, Selector

log = logging.getLogger("agd_vllm")


class Preparer:
    """Applies one run's settings to its rows.

    `default_roi` is for rows that name no region (None: such rows have no tokens as region); `roi_heads`, (layer, head)
    pairs, are part of every region; a row with neither is decoded unguided. Not `guided`, no region is looked at, but
    where it is `emphasized`: repeated at the end of the prompt.
    `max_tokens` is for rows that name none. `max_model_len` bounds prompt and output together, in tokens.
    `pause_token_id` is the token by which the gate stops the engine, so no prompt may hold it. `vocab_size` is the
    model's: a tokenizer may know tokens beyond it. `eos_ids` end a row. `date` is as for ChatTemplate.
    What is no fault of a row but hardly meant goes to `warn`, each kind once, with the first row of it.
    Raises ValueError for `chat_template_kwargs` that are no variables of a template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        default_roi: tuple[Selector, ...] | None,
        roi_heads: tuple[tuple[int, int], ...] = (),
        guided: bool,
        emphasized: bool = False,
        max_tokens: int,
        max_model_len: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        pause_token_id: int | None = None,
        vocab_size: int | None = None,
        eos_ids: frozenset[int] = frozenset(),
        date: datetime | None = None,
    ):
        self.warn: Callable[[str], None] = log.warning
        self._warned: set[str] = set()
        self.guided = guided
        self._emphasized = emphasized
        self._template = ChatTemplate(tokenizer, date)
        self._tokenizer = ChatTokenizer(tokenizer)
        self._longest_token = max(map(len, tokenizer.get_vocab()))  # in characters, or in more of its own for bytes
        self._default_roi = default_roi
        self._heads = roi_heads
        self._max_tokens = max_tokens
        self._max_model_len = max_model_len
        self._kwargs = dict(chat_template_kwargs or {})
        self._pause_token_id = pause_token_id
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._unseen = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        if reserved := self._template.reserved(self._kwargs):
            raise ValueError(f"chat template kwargs cannot set {', '.join(reserved)}; the model or agd-vllm sets it")

    def prepare(self, row: InputRow) -> PreparedRow:
        """Prepares one row. Raises RowRefused with what is wrong with it and how to mend it."""
        if self._emphasized:
            row = self._emphasize(row)
        rendered, tokens = self.encode(row)
        room = self._room(len(tokens.ids))
        if self._pause_token_id is not None and self._pause_token_id in tokens.ids:
            raise RowRefused(
                "special_tokens",
                f"the prompt holds the token {self._pause_token_id}, which agd-vllm reserves for pausing; take it out",
            )
        if self._vocab_size is not None and max(tokens.ids) >= self._vocab_size:
            raise RowRefused(
                "special_tokens",
                f"the prompt holds the token {max(tokens.ids)}, the model knows {self._vocab_size}; take it out",
            )
        self._check_stop_tokens(row)
        max_tokens = row.max_tokens if row.max_tokens is not None else self._max_tokens
        max_tokens = max_tokens if room is None else min(max_tokens, room)
        min_tokens = row.min_tokens or 0
        if min_tokens > max_tokens:
            raise RowRefused(
                "min_tokens",
                f"min_tokens is {min_tokens}, but at most {max_tokens} tokens can be generated "
                "(max_tokens, or what the prompt leaves of --max-model-len)",
            )
        roi = self._region(row, rendered, tokens)
        self._warn_of_doubled_tokens(row, tokens)
        self._warn_of_stop_strings(row)
        return PreparedRow(
            id=row.id,
            prompt_token_ids=tokens.ids,
            roi=roi,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop=row.stop,
            stop_token_ids=row.stop_token_ids,
        )

    def _emphasize(self, row: InputRow) -> InputRow:
        selectors = self._default_roi if row.roi is None else row.roi
        if selectors is None:
            self._say_once(
                "emphasize",
                row,
                "it names no region, so nothing is repeated and it is decoded greedily; give the row a roi, or all "
                "such rows one by --roi",
            )
            return row
        return emphasized(row, selectors, self._render(row))

    def warn_of_region(self, row: InputRow, prepared: PreparedRow) -> None:
        """Warns of a region with the prompt's first token, which draws much of all attention, whatever it says."""
        if prepared.roi.spans and prepared.roi.spans[0].start == 0:
            self._say_once(
                "region",
                row,
                "the region holds the prompt's first token; all tokens attend to it whatever it says, which skews the "
                "scores; begin the region later (this tokenizer puts no BOS token before the prompt)",
            )

    def _say_once(self, kind: str, row: InputRow, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            self.warn(f"row {row.id!r}: {message} (said once, of the first such row)")

    def _warn_of_doubled_tokens(self, row: InputRow, tokens: Tokens) -> None:
        if row.prompt is not None and (token := self._tokenizer.doubled_token(tokens)):
            self._say_once(
                "doubled",
                row,
                f"the prompt spells out {token}, which the tokenizer adds as well, so it stands there twice; "
                "leave it out of the prompt",
            )

    def _warn_of_stop_strings(self, row: InputRow) -> None:
        for stop in row.stop if "stop" not in self._warned else ():
            for token, i in self._unseen.items():
                if token in stop and i not in self._eos_ids and i not in row.stop_token_ids:
                    shown = json.dumps(stop, ensure_ascii=False)
                    self._say_once(
                        "stop",
                        row,
                        f"the stop string {shown} holds the special token {token}, which the text leaves out, so the "
                        f"row does not stop there; give stop_token_ids [{i}]",
                    )

    def encode(self, row: InputRow) -> tuple[Rendered, Tokens]:
        """The row's prompt as text and as tokens. Raises RowRefused."""
        rendered = self._render(row)
        self._check_size(rendered.text)
        return rendered, self._tokenizer.encode(rendered)

    def _render(self, row: InputRow) -> Rendered:
        if row.messages is None:
            return raw_prompt(row.prompt)
        self._check_kwargs(row.chat_template_kwargs)
        return self._template.render(row.messages, {**self._kwargs, **row.chat_template_kwargs})

    def _check_size(self, text: str) -> None:
        """Refuses before it is tokenized, which takes seconds a megabyte, a prompt that can only be too long."""
        if self._max_model_len is not None and len(text) > self._max_model_len * self._longest_token:
            raise RowRefused(
                "prompt_length",
                f"the prompt has {len(text)} characters, more than the {self._max_model_len} tokens that the model "
                "takes could hold; shorten it",
            )

    def _check_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        if not kwargs:
            return
        if reserved := self._template.reserved(kwargs):
            raise RowRefused(
                "chat_template_kwargs",
                f"chat_template_kwargs cannot set {', '.join(reserved)}; the model or agd-vllm sets it",
            )
        # What a template prints of a variable is its own text to the tokenizer, and a row is data.
        if token := self._tokenizer.spells_special_token(kwargs):
            raise RowRefused("chat_template_kwargs", f"chat_template_kwargs spell out the special token {token}")

    def _check_stop_tokens(self, row: InputRow) -> None:
        largest = max(row.stop_token_ids, default=-1)
        if self._vocab_size is not None and largest >= self._vocab_size:
            raise RowRefused(
                "stop_token_ids",
                f"stop_token_ids holds {largest}, the model's tokens are 0 to {self._vocab_size - 1}; take it out",
            )

    def _room(self, prompt_tokens: int) -> int | None:
        """Tokens that may follow the prompt, None for any number. Raises RowRefused if there is none, or no prompt."""
        if prompt_tokens == 0:
            raise RowRefused("prompt_length", "the prompt has no tokens; give it some text")
        if self._max_model_len is None:
            return None
        if prompt_tokens >= self._max_model_len:
            raise RowRefused(
                "prompt_length",
                f"the prompt has {prompt_tokens} tokens, the model takes {self._max_model_len} with at least one to "
                "generate; shorten it or raise --max-model-len",
            )
        return self._max_model_len - prompt_tokens

    def _region(self, row: InputRow, rendered: Rendered, tokens: Tokens) -> Roi:
        if not self.guided:
            return Roi()
        spans = self._named_region(row, rendered, tokens).spans
        return Roi(spans, self._heads)

    def _named_region(self, row: InputRow, rendered: Rendered, tokens: Tokens) -> Roi:
        """The tokens that the row names, or by default the run."""
        if row.roi is not None:
            return region(row.roi, rendered, tokens)
        if self._default_roi is None:
            return Roi()
        try:
            return region(self._default_roi, rendered, tokens)
        except RowRefused as refusal:
            raise RowRefused(
                refusal.type, f"{refusal}; give the row a roi, or decode rows without one unguided with --roi none"
            ) from refusal
