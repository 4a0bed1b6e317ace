"""Tokens as the text that a reader sees: each token's share of the decoded text, kept once however often it occurs."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

# A candidate is shown alone; behind this it keeps the white space that some tokenizers drop at the start of a text.
_CARRIER = "a"


class TextTable:
    """Numbers texts: a number stands for a text and for whether a special token wrote it."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, bool], int] = {}

    def number(self, text: str, special: bool) -> int:
        return self._numbers.setdefault((text, special), len(self._numbers))

    @property
    def texts(self) -> list[str]:
        return [text for text, _ in self._numbers]

    @property
    def special(self) -> list[int]:
        """The numbers of texts that special tokens wrote."""
        return [number for (_, special), number in self._numbers.items() if special]


class TokenTexts:
    """One tokenizer's tokens as numbers of a table. Runs that share the table can be compared by these numbers.

    A character that several tokens share, byte by byte, shows with the last of them; the ones before have an empty
    text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, table: TextTable):
        self._backend = tokenizer.backend_tokenizer
        self._special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._carrier = tokenizer(_CARRIER, add_special_tokens=False)["input_ids"]
        self._table = table
        self._alone: dict[int, int] = {}

    def sequence(self, token_ids: Iterable[int]) -> list[int]:
        """The text of each token of a sequence; together they are the sequence's text."""
        stream = DecodeStream(skip_special_tokens=False)
        return [self._number(token_id, stream.step(self._backend, token_id) or "") for token_id in token_ids]

    def alone(self, token_id: int) -> int:
        """The text of a token that might follow some text."""
        if token_id not in self._alone:
            stream = DecodeStream(ids=self._carrier, skip_special_tokens=False)
            text = stream.step(self._backend, token_id)
            if text is None:  # a part of a character
                text = self._backend.id_to_token(token_id) or f"<{token_id}>"
            self._alone[token_id] = self._number(token_id, text)
        return self._alone[token_id]

    def _number(self, token_id: int, text: str) -> int:
        return self._table.number(text, token_id in self._special)
