"""When a row ends: EOS and stop tokens, stop strings, length; the same for sampled and for selected tokens."""

from __future__ import annotations

import copy

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from agd_vllm.records import PreparedRow

STOP, LENGTH = "stop", "length"
INVALID_PREFIX = "Invalid prefix encountered"


class StopCheck:
    """Follows one row's output token by token, as vLLM's own checks do: stop tokens come before length.

    Stop strings are looked for in the text without special tokens. Sessions refuse them, so they are checked here.
    """

    def __init__(self, row: PreparedRow, eos_ids: frozenset[int], tokenizer: PreTrainedTokenizerFast):
        self._stop_ids = eos_ids.union(row.stop_token_ids)
        self._max_tokens = row.max_tokens
        self._min_tokens = row.min_tokens
        self._stop_strings = row.stop
        self._prompt, self._tokenizer = row.prompt_token_ids, tokenizer
        self.restart()

    def restart(self) -> None:
        """Forgets the output: the row is decoded from its prompt again."""
        self._output = OutputText(self._prompt, self._tokenizer)
        self._read = 0  # how many of `token_ids` the text holds
        self.token_ids: list[int] = []
        self.stop_string: str | None = None

    def add(self, token_id: int) -> str | None:
        """Appends a token; returns the finish reason if it ends the row, else None."""
        self.token_ids.append(token_id)
        if token_id in self._stop_ids:
            return STOP
        if self._stop_strings and self._found_stop_string():
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

    def _found_stop_string(self) -> bool:
        new = self._read_on(len(self.token_ids))
        # As in vLLM: text written while below min_tokens is not searched later on either.
        if not new or len(self.token_ids) <= self._min_tokens:
            return False
        text = self._output.text
        starts = ((text.find(stop, max(0, len(text) - new - len(stop) + 1)), stop) for stop in self._stop_strings)
        found = [(at, stop) for at, stop in starts if at >= 0]
        if not found:
            return False
        # As in vLLM: the one that is complete first, of several the one that the row names first.
        at, self.stop_string = min(found, key=lambda each: each[0] + len(each[1]))
        self._output.text = text[:at]
        return True

    def _read_on(self, end: int) -> int:
        """Reads the tokens before `end` that have not been read; returns how many characters they add."""
        before = len(self._output.text)
        for token_id in self.token_ids[self._read : end]:
            self._output.add(token_id)
        self._read = max(self._read, end)
        return len(self._output.text) - before

    def text(self) -> str:
        """The output as vLLM writes it, without special tokens and without what ended it, a stop string or token."""
        if self.stop_string is None:
            ended = self.token_ids and self.token_ids[-1] in self._stop_ids
            self._read_on(len(self.token_ids) - 1 if ended else len(self.token_ids))
        return self._output.text


class OutputText:
    """The text of a row's tokens as it grows, as vLLM's FastIncrementalDetokenizer writes it.

    Tokens are read after those of the prompt: alone, the first would lose its space with the decoders of Llama 2 and
    Mistral. A character whose last bytes have not come is no text yet.
    """

    def __init__(self, prompt_token_ids: list[int], tokenizer: PreTrainedTokenizerFast):
        self.text = ""
        self._tokenizer = tokenizer
        # All of the prompt: its last tokens may begin within a character, or be nothing but special tokens.
        self._stream = DecodeStream(ids=prompt_token_ids, skip_special_tokens=True)

    def add(self, token_id: int) -> None:
        self.text += self._step(token_id) or ""

    def _step(self, token_id: int) -> str | None:
        tokenizer = self._tokenizer.backend_tokenizer
        try:
            return self._stream.step(tokenizer, token_id)
        except Exception as error:  # tokenizers raises no kind of its own
            if not str(error).startswith(INVALID_PREFIX):
                raise
            # Bytes that were a character by themselves are none together with the next one. As vLLM: begun anew.
            self._stream = DecodeStream(skip_special_tokens=True)
            return self._stream.step(tokenizer, token_id)
