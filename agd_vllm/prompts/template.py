"""A model's chat template: renders messages to text and knows where each message's own words stand in it."""

from __future__ import annotations

import inspect
import itertools
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from agd_vllm.prompts.template_date import date_variables
from agd_vllm.prompts.traced import Run, Traced, keep_traces, traced_messages
from agd_vllm.records import RowRefused

# Marks that rows cannot guess, so that no text of theirs is ever mistaken for one. They never reach a prompt.
_NONCE = secrets.token_hex(8)
_WRAPPED = re.compile(rf"\ue000{_NONCE}:(\d+)\ue001(.*?)\ue001{_NONCE}:\1\ue000", re.DOTALL)

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where words of a message stand in the rendered text: text[start:end] is content[offset : offset + end - start].

    All three count Unicode code points.
    """

    start: int
    end: int
    offset: int


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of a prompt and the places of each content in it.

    For chat rows `contents` and `roles` run over the messages as given; a raw prompt is one content without a role.
    A message that cannot be found in the text has no places and its reason in `faults`, to follow "message 0 (system)".
    """

    text: str
    contents: tuple[str, ...]
    roles: tuple[str, ...]
    places: tuple[tuple[Place, ...], ...]
    faults: Mapping[int, str]

    @property
    def is_chat(self) -> bool:
        return bool(self.roles)


def raw_prompt(prompt: str) -> Rendered:
    """A `prompt` row: its text as it is, all of it the row's own words."""
    return Rendered(prompt, (prompt,), (), ((Place(0, len(prompt), 0),),), {})


class ChatTemplate:
    """The chat template that comes with a tokenizer; rows never bring one.

    `date` (local time) is what it writes as today's; None: the clock's, as in Transformers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, date: datetime | None = None):
        self._tokenizer = tokenizer
        self._date = {} if date is None else date_variables(tokenizer.chat_template, date)
        self._control_tokens = [token.content for token in control_tokens(tokenizer).values()]
        # Arguments of the renderer, and names of special tokens: no variables for a user to set.
        self._reserved = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"documents"}
        self._reserved |= {"messages", *tokenizer.special_tokens_map}

    def reserved(self, kwargs: Mapping[str, Any]) -> list[str]:
        """The names in `kwargs` that are not the template's own variables and so cannot be set."""
        return sorted(self._reserved.intersection(kwargs))

    def render(self, messages: Messages, kwargs: Mapping[str, Any]) -> Rendered:
        """Renders a prompt for the next answer; a last message of role assistant is left open, to be continued.

        Raises RowRefused when the model has no template, or the template refuses the messages.
        """
        if self._tokenizer.chat_template is None:
            raise RowRefused(
                "chat_template", "the model has no chat template; give the row as `prompt`, or use a chat model"
            )
        try:
            text = self._apply(messages, kwargs)
        except Exception as error:  # a template is a program of the model's, and may fail in any way
            raise RowRefused("chat_template", f"the chat template refuses the row: {one_line(error)}") from error
        found, faults = self._locate(text, messages, kwargs)
        return Rendered(
            text=text,
            contents=tuple(message["content"] for message in messages),
            roles=tuple(message["role"] for message in messages),
            places=tuple(tuple(found.get(i, ())) for i in range(len(messages))),
            faults=faults,
        )

    def _apply(self, messages: Messages, kwargs: Mapping[str, Any]) -> str:
        continued = messages[-1]["role"] == "assistant"
        return self._tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=not continued,
            continue_final_message=continued,
            **(self._date | kwargs),
        )

    def _locate(
        self, text: str, messages: Messages, kwargs: Mapping[str, Any]
    ) -> tuple[dict[int, list[Place]], dict[int, str]]:
        """Finds each content in `text` by rendering again with the contents wrapped between marks.

        A template that looks into a message may then go another way. Such a one is given contents that trace where
        they go; what it makes of them without leaving a trace is tried between marks once more. However many messages
        there are, they are rendered four times at most.
        """
        filled = [i for i, message in enumerate(messages) if message["content"]]
        faults = {i: "is empty" for i in range(len(messages)) if i not in filled}
        found = self._align(text, messages, kwargs, filled)
        if found is None:
            found, changed = self._trace(text, messages, kwargs)
            faults.update(dict.fromkeys(changed, "is changed by the chat template"))
            # Text that has lost its traces may be anywhere: what could act as a control token must be proven to lie
            # where it was found, and nowhere else.
            spelled = [i for i in filled if i not in changed and self._spells_control_token(messages[i]["content"])]
            untraced = [i for i in filled if i not in found and i not in changed and i not in spelled]
            for suspects in filter(None, (spelled, untraced)):
                proven = self._align(text, messages, kwargs, suspects)
                if proven is None:
                    faults.update(dict.fromkeys(suspects, "is changed or left out by the chat template"))
                found = {i: places for i, places in found.items() if i not in suspects} | (proven or {})
        for i in filled:
            if i not in found:
                faults.setdefault(i, "is left out by the chat template")
        return found, faults

    def _spells_control_token(self, content: str) -> bool:
        return any(token in content for token in self._control_tokens)

    def _trace(
        self, text: str, messages: Messages, kwargs: Mapping[str, Any]
    ) -> tuple[dict[int, list[Place]], set[int]]:
        """Places of the messages that stand in `text` word for word, and which ones stand there in part, somewhere."""
        try:
            keep_traces(self._tokenizer)
            traced = self._apply(traced_messages(messages), kwargs)
        except Exception:  # it rendered the real contents, so it is the tracing that it cannot bear
            return {}, set()
        runs = traced.runs if isinstance(traced, Traced) and traced == text else ()
        found: dict[int, list[Place]] = {}
        changed: set[int] = set()
        for i, group in itertools.groupby(range(len(runs)), key=lambda index: runs[index].message):
            indices = list(group)
            # What other messages have written is none of this one's, however it reads.
            free = runs[indices[0] - 1].end if indices[0] else 0
            limit = runs[indices[-1] + 1].start if indices[-1] + 1 < len(runs) else len(text)
            for run in (runs[index] for index in indices):
                if run.start < free:
                    continue
                place = _whole(messages[i]["content"], text, run, free, limit)
                if place is None:
                    changed.add(i)
                else:
                    found.setdefault(i, []).append(place)
                    free = place.end
        return {i: places for i, places in found.items() if i not in changed}, changed

    def _align(
        self, text: str, messages: Messages, kwargs: Mapping[str, Any], wrapped: list[int]
    ) -> dict[int, list[Place]] | None:
        """Places of the `wrapped` messages, or None if `text` is not the template's parts with the contents between."""
        marked = [dict(message) for message in messages]
        for i in wrapped:
            marked[i]["content"] = f"\ue000{_NONCE}:{i}\ue001{messages[i]['content']}\ue001{_NONCE}:{i}\ue000"
        try:
            pieces = _WRAPPED.split(self._apply(marked, kwargs))
        except Exception:  # it rendered the real contents, so it is the marks that it cannot bear
            return None
        parts, indices = pieces[::3], [int(i) for i in pieces[1::3]]
        # Every end that the text so far can have, with the places that lead there: templates trim or do not trim.
        ends: dict[int, tuple] = {0: ()}
        for part, i in zip(parts, indices, strict=False):
            after: dict[int, tuple] = {}
            for end, trail in ends.items():
                start = end + len(part)
                if text.startswith(part, end):
                    for offset, form in _forms(messages[i]["content"]):
                        if text.startswith(form, start):
                            place = Place(start, start + len(form), offset)
                            after.setdefault(place.end, (trail, i, place))
            ends = after
        for end, trail in ends.items():
            if text[end:] == parts[-1]:
                return _places(trail)
        return None


def control_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[int, AddedToken]:
    """Added tokens that are flagged as special, or that the tokenizer names (its EOS)."""
    named = set(tokenizer.all_special_ids)
    return {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.special or i in named}


def one_line(error: Exception) -> str:
    """The words of an error on one line, cut where they grow long."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 300 else line[:297] + "..."


def _whole(content: str, text: str, run: Run, begin: int, end: int) -> Place | None:
    """The place of a message that a run of it belongs to, if it stands there whole, between `begin` and `end`."""
    for offset, form in sorted(_forms(content), key=lambda form: -len(form[1])):
        start = run.start - run.offset + offset
        if begin <= start <= run.start and run.end <= start + len(form) <= end and text.startswith(form, start):
            return Place(start, start + len(form), offset)
    return None


def _forms(content: str) -> Iterator[tuple[int, str]]:
    """The ways in which templates write a content: as given or trimmed, each with the characters lost at its start."""
    yield 0, content
    if content[0].isspace() or content[-1].isspace():
        lost = len(content) - len(content.lstrip())
        yield lost, content.strip()
        yield lost, content.lstrip()
        yield 0, content.rstrip()


def _places(trail: tuple) -> dict[int, list[Place]]:
    """Unwinds a trail (earlier trail, message, place) into the places of each message."""
    found: dict[int, list[Place]] = {}
    while trail:
        trail, i, place = trail
        found.setdefault(i, []).insert(0, place)
    return found
