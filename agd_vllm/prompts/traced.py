"""Strings that know which message their characters come from, through all that chat templates do with them.

A template that looks into its messages goes another way where they carry marks. These strings look like the messages
themselves, and what it makes of them tells where it took it from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils


@dataclass(frozen=True, slots=True)
class Run:
    """Characters [start, end) of a text are those of message `message` from its character `offset` on."""

    start: int
    end: int
    message: int
    offset: int


class Traced(str):
    """A string with the runs of its characters that are a message's, in order.

    What cuts it or puts it together keeps them; what writes other characters (`upper`, `join`, `%`) gives a plain one.
    """

    runs: tuple[Run, ...]

    def __str__(self) -> str:
        return self  # str() keeps it

    def __deepcopy__(self, memo: Any) -> Traced:
        return self

    def __add__(self, other: Any) -> str:
        return _concat((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: Any) -> str:
        return _concat((other, self)) if isinstance(other, str) else NotImplemented

    def __getitem__(self, index: Any) -> str:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self._cut(start, max(start, stop)) if step == 1 else super().__getitem__(index)
        start = range(len(self))[index]
        return self._cut(start, start + 1)

    def _cut(self, start: int, stop: int) -> str:
        runs = (
            Run(max(run.start, start) - start, min(run.end, stop) - start, run.message, run.offset + _lost(run, start))
            for run in self.runs
        )
        return _traced(super().__getitem__(slice(start, stop)), [run for run in runs if run.start < run.end])

    def strip(self, chars: str | None = None) -> str:
        return _strip(_strip(self, "lstrip", chars), "rstrip", chars)

    def lstrip(self, chars: str | None = None) -> str:
        return _strip(self, "lstrip", chars)

    def rstrip(self, chars: str | None = None) -> str:
        return _strip(self, "rstrip", chars)

    def removeprefix(self, prefix: str) -> str:
        return self[len(prefix) :] if prefix and self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> str:
        return self[: -len(suffix)] if suffix and self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: int = -1) -> list[str]:
        return self._pieces(super().split(sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: int = -1) -> list[str]:
        return self._pieces(super().rsplit(sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        lines = self._pieces(super().splitlines(True), "")
        return [line[: len(kept)] for line, kept in zip(lines, super().splitlines(keepends), strict=True)]

    def partition(self, sep: str) -> tuple[str, str, str]:
        return tuple(self._pieces(super().partition(sep), ""))

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        return tuple(self._pieces(super().rpartition(sep), ""))

    def replace(self, old: str, new: str, count: int = -1) -> str:
        if not old:
            return super().replace(old, new, count)
        first, *rest = self.split(old, count)
        return _concat((first, *(part for piece in rest for part in (new, piece))))

    def _pieces(self, pieces: Iterable[str], sep: str | None) -> list[str]:
        """These pieces, which stand in the string one after another with `sep` or white space (None) between."""
        found, at = [], 0
        for piece in pieces:
            if sep is None:
                at = self.index(piece, at)
            found.append(self._cut(at, at + len(piece)))
            at += len(piece) + len(sep or "")
        return found


def _lost(run: Run, start: int) -> int:
    return max(0, start - run.start)


def _strip(text: str, side: str, chars: str | None) -> str:
    kept = len(getattr(str, side)(text, chars))
    return text[len(text) - kept :] if side == "lstrip" else text[:kept]


def _traced(text: str, runs: Sequence[Run]) -> str:
    if not runs:
        return text
    made = Traced(text)
    made.runs = tuple(runs)
    return made


def _concat(parts: Iterable[str]) -> str:
    """`"".join(parts)` with the runs of its parts; two that go on with each other become one."""
    parts = list(parts)
    runs: list[Run] = []
    at = 0
    for part in parts:
        for run in part.runs if isinstance(part, Traced) else ():
            start, end = run.start + at, run.end + at
            last = runs[-1] if runs else None
            goes_on = last and last.message == run.message and last.end == start
            if goes_on and last.offset + last.end - last.start == run.offset:
                runs[-1] = Run(last.start, end, last.message, last.offset)
            else:
                runs.append(Run(start, end, run.message, run.offset))
        at += len(part)
    return _traced("".join(parts), runs)


def traced_messages(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The messages with contents that tell where they go."""
    return [
        {**message, "content": _traced(content, [Run(0, len(content), i, 0)] if content else [])}
        for i, message in enumerate(messages)
        for content in [message["content"]]
    ]


def keep_traces(tokenizer: PreTrainedTokenizerFast) -> None:
    """Makes the tokenizer's chat template, compiled, join its pieces by `_concat`, which plain strings cannot tell."""
    template = chat_template_utils._compile_jinja_template(tokenizer.get_chat_template())
    template.environment.concat = _concat
    template.root_render_func.__globals__["str_join"] = lambda parts: _concat(map(str, parts))
