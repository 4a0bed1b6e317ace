"""When a row ends: EOS and stop tokens, stop strings, length; the same for sampled and for selected tokens."""

from __future__ import annotations

import copy

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from agd_vllm.records import PreparedRow

STOP, LENGTH = "stop", "length"


class StopCheck:
    """Follows one row's output token by token, as vLLM's own checks do: stop tokens come before length.

    Stop strings are looked for in the text without special tokens. Sessions refuse them, so they are checked here.
    """

    def __init__(self, row: PreparedRow, eos_ids: frozenset[int], tokenizer: PreTrainedTokenizerFast):
        self._stop_ids = eos_ids.union(row.stop_token_ids)
        self._max_tokens = row.max_tokens
        self._min_tokens = row.min_tokens
        self._stop_strings = row.stop
        self._tokenizer = tokenizer
        self._prompt_end = row.prompt_token_ids[-8:]
        self.restart()

    def restart(self) -> None:
        """Forgets the output: the row is decoded from its prompt again."""
        self._text = ""
        if self._stop_strings:
            # The stream sees the end of the prompt, or the first token would lose its leading space.
            self._stream = DecodeStream(ids=self._prompt_end, skip_special_tokens=True)
        self.token_ids: list[int] = []
        self.stop_string: str | None = None

    def add(self, token_id: int) -> str | None:
        """Appends a token; returns the finish reason if it ends the row, else None."""
        self.token_ids.append(token_id)
        if token_id in self._stop_ids:
            return STOP
        if self._stop_strings and self._found_stop_string(token_id):
            return STOP
        return LENGTH if len(self.token_ids) >= self._max_tokens else None

    def follower(self) -> StopCheck:
        """For a second sequence that is given the same tokens; stop strings are left to the first one's check."""
        follower = copy.copy(self)
        follower.token_ids, follower._stop_strings = list(self.token_ids), ()
        return follower

    @property
    def remaining(self) -> int:
        return self._max_tokens - len(self.token_ids)

    def _found_stop_string(self, token_id: int) -> bool:
        new = self._stream.step(self._tokenizer.backend_tokenizer, token_id) or ""
        self._text += new
        # As in vLLM: text written while below min_tokens is not searched later on either.
        if len(self.token_ids) <= self._min_tokens:
            return False
        ends = [(at, s) for s in self._stop_strings if (at := self._find(s, len(new))) >= 0]
        if not ends:
            return False
        at, self.stop_string = min(ends)
        self._text = self._text[:at]
        return True

    def _find(self, stop: str, new: int) -> int:
        return self._text.find(stop, max(0, len(self._text) - new - len(stop) + 1)) if new else -1

    def text(self) -> str:
        """The output without special tokens and without what ended it, a stop string or a stop token."""
        if self.stop_string is not None:
            return self._text
        ended = self.token_ids and self.token_ids[-1] in self._stop_ids
        return self._tokenizer.decode(self.token_ids[:-1] if ended else self.token_ids, skip_special_tokens=True)
