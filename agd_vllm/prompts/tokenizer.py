"""Text to tokens with character offsets; special tokens that a message spells out stay plain text."""

from __future__ import annotations

import copy
import secrets
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from agd_vllm.prompts.template import Rendered, control_tokens, one_line
from agd_vllm.records import RowRefused

_NONCE = secrets.token_hex(8)  # in the stand-ins of control tokens, so that no row can write one


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of a text and, for each, its characters [start, end) there (code points; empty for added tokens)."""

    ids: list[int]
    offsets: list[tuple[int, int]]


def load_tokenizer(model: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """Loads the fast tokenizer of a local model directory or hub id.

    Raises ValueError with one line if there is none, or if it is a slow one, which cannot tell where its tokens lie.
    """
    looks_local = Path(model).is_absolute() or model.startswith((".", "~"))
    if looks_local and not Path(model).exists():
        raise ValueError(f"model {model}: no such directory; give a local model directory or a hub id")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # from_pretrained raises whatever its readers of files and formats raise
        raise ValueError(f"model {model}: no usable tokenizer: {one_line(error)}") from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"model {model}: {type(tokenizer).__name__} is a slow tokenizer, which gives no character offsets; "
            "regions need a fast one (a tokenizer.json beside the model)"
        )
    return tokenizer


@dataclass(frozen=True, slots=True)
class _Inert:
    """A copy of the tokenizer with a stand-in for each control token: an added token that is not special."""

    tokenizer: PreTrainedTokenizerFast
    texts: dict[int, str]  # control id -> the stand-in's text
    stand_ins: dict[int, int]  # the stand-in's id -> control id


class ChatTokenizer:
    """One model's tokenizer as rows meet it.

    Special tokens that a chat row's messages spell out are plain text, never control tokens: those come from the
    template alone. In a `prompt` row they are parsed, as the raw text is wholly in the user's hands.
    Special are the tokens flagged so and those that the tokenizer names (its EOS); other added tokens, such as
    `<think>`, are a part of the language that rows may write.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._tokenizer = tokenizer
        self._control = control_tokens(tokenizer)
        self._inert: _Inert | None = None
        _cover_whitespace(tokenizer)

    def encode(self, rendered: Rendered) -> Tokens:
        """Tokenizes as vLLM does: special tokens are added to raw prompts only, a chat template writes its own.

        Raises RowRefused where a special token spelled out in a message cannot be told from the template's.
        """
        if not rendered.is_chat:
            return self._call(self._tokenizer, rendered.text, add_special_tokens=True)
        for i in rendered.faults:
            token = self.spells_special_token(rendered.contents[i])
            if token is not None:
                raise RowRefused(
                    "special_tokens",
                    f"message {i} ({rendered.roles[i]}) spells out the special token {token} and {rendered.faults[i]}, "
                    "so it might act as a control token; take it out",
                )
        tokens = self._call(self._tokenizer, rendered.text)
        own = sorted((place.start, place.end) for places in rendered.places for place in places)
        starts = [start for start, _ in own]
        for _, start, end in self._markers(rendered.text, tokens):
            before = bisect_left(starts, end) - 1
            if before >= 0 and own[before][1] > start:
                return self._encode_inert(rendered.text, own)
        return tokens

    def doubled_token(self, tokens: Tokens) -> str | None:
        """A special token that a raw prompt begins or ends with, and that the tokenizer has added to it there."""
        lying = [index for index, (start, end) in enumerate(tokens.offsets) if start < end]
        if not lying:
            return None
        first, last = lying[0], lying[-1]
        ends = ((tokens.ids[first], tokens.ids[:first]), (tokens.ids[last], tokens.ids[last + 1 :]))
        return next((self._control[i].content for i, added in ends if i in added and i in self._control), None)

    def spells_special_token(self, value: Any) -> str | None:
        """The first special token spelled out anywhere in a JSON value, or None."""
        if isinstance(value, str):
            return next((token.content for token in self._control.values() if token.content in value), None)
        if isinstance(value, Mapping):
            value = [*value.keys(), *value.values()]
        if isinstance(value, Sequence):
            return next(filter(None, map(self.spells_special_token, value)), None)
        return None

    def _markers(self, text: str, tokens: Tokens) -> Iterator[tuple[int, int, int]]:
        """Control tokens parsed from `text`: id, and characters [start, end)."""
        for token_id, (start, end) in zip(tokens.ids, tokens.offsets, strict=True):
            if token_id in self._control:
                # The unknown token stands for any text; it was spelled out only if that text is its name.
                spelled = self._control[token_id].content in text[start:end]
                if spelled or token_id != self._tokenizer.unk_token_id:
                    yield token_id, start, end

    def _encode_inert(self, text: str, own: list[tuple[int, int]]) -> Tokens:
        """Tokenizes `text` with control tokens parsed outside the `own` ranges only.

        Each of the template's markers is replaced by a stand-in, an added token that is not special, and the whole is
        tokenized with special tokens split; so the words keep the tokens that they have in their surroundings.
        """
        inert = self._inert_tokenizer()
        pieces: list[str] = []
        origin: list[int] = []  # for each character of the joined pieces, its index in `text`
        markers: list[tuple[int, int]] = []

        def keep(start: int, end: int) -> None:
            pieces.append(text[start:end])
            origin.extend(range(start, end))

        at = 0
        for start, end in [*own, (len(text), len(text))]:
            base = at
            between = self._call(self._tokenizer, text[base:start])
            for token_id, first, last in self._markers(text[base:start], between):
                keep(at, base + first)
                at = base + last
                pieces.append(inert.texts[token_id])
                origin.extend([at] * len(pieces[-1]))
                markers.append((base + first, at))
            keep(at, end)
            at = end

        tokens = self._call(inert.tokenizer, "".join(pieces), split_special_tokens=True)
        origin.append(len(text))
        ranges = iter(markers)
        for index, (start, end) in enumerate(tokens.offsets):
            token_id = tokens.ids[index]
            if token_id in inert.stand_ins:
                tokens.ids[index] = inert.stand_ins[token_id]
                tokens.offsets[index] = next(ranges)
                continue
            if token_id in self._control and token_id != self._tokenizer.unk_token_id:
                raise RowRefused(
                    "special_tokens",
                    f"a message spells out the special token {self._control[token_id].content}, which this tokenizer "
                    "cannot read as plain text; take it out",
                )
            tokens.offsets[index] = (origin[start], origin[end - 1] + 1 if end > start else origin[start])
        return tokens

    def _inert_tokenizer(self) -> _Inert:
        # Made when a row first needs it: few runs do, and a copy of a large tokenizer takes a second.
        if self._inert is None:
            tokenizer = copy.deepcopy(self._tokenizer)
            # Named, but not flagged: unflagged they would not be split.
            unflagged = [token for token in self._control.values() if not token.special]
            tokenizer.add_tokens([AddedToken(token.content, special=True) for token in unflagged], special_tokens=True)
            texts = {i: f"\ue000{_NONCE}-{i}\ue001" for i in self._control}
            tokenizer.add_tokens(
                [
                    AddedToken(texts[i], lstrip=token.lstrip, rstrip=token.rstrip, normalized=False, special=False)
                    for i, token in self._control.items()
                ]
            )
            stand_ins = {tokenizer.convert_tokens_to_ids(text): i for i, text in texts.items()}
            self._inert = _Inert(tokenizer, texts, stand_ins)
        return self._inert

    @staticmethod
    def _call(tokenizer: PreTrainedTokenizerFast, text: str, *, add_special_tokens: bool = False, **options) -> Tokens:
        encoded = tokenizer(
            text,
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **options,
        )
        return Tokens(encoded["input_ids"], encoded["offset_mapping"])


def _cover_whitespace(tokenizer: PreTrainedTokenizerFast) -> None:
    """Makes byte-level tokens report the white space that they hold (`trim_offsets` hides it); ids stay the same."""
    post_processor = tokenizer.backend_tokenizer.post_processor
    try:
        processors = list(post_processor)
    except TypeError:  # a single one, or none
        processors = [post_processor]
    for processor in processors:
        if getattr(processor, "trim_offsets", False):
            processor.trim_offsets = False
