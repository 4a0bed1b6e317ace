"""The shape of an input row: one JSON object in, one `InputRow` or one readable refusal out."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from agd_vllm.input.wording import place_text, shown
from agd_vllm.records import FLOAT32_MAX, InputRow, RowRefused, Selector

Role = Literal["system", "user", "assistant"]
ROLES = get_args(Role)
INT32_MAX = 2**31 - 1  # token ids and counts are int32 in the output
MAX_SELECTORS = 256  # each is searched for in the whole prompt

# Parameters of sampling APIs that people leave in their rows. A row may carry each at the value that changes nothing;
# any other value asks for what a deterministic decoder does not do, and ignoring it would falsify the user's results.
NEUTRAL = {
    "temperature": 0,
    "n": 1,
    "best_of": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "length_penalty": 1,
    "use_beam_search": False,
    "stream": False,
    "echo": False,
    "ignore_eos": False,
    "logprobs": False,
    "prompt_logprobs": False,
    "top_logprobs": 0,
    "logit_bias": {},
    "tools": [],
    "tool_choice": "none",
    "functions": [],
    "function_call": "none",
    "response_format": {"type": "text"},
}
# The same of a message: what clients put into the answers that people send back to be continued.
NEUTRAL_IN_MESSAGE: dict[str, list] = {"tool_calls": [], "annotations": []}
# These shape only a random draw, or who asks for it: with no draw they mean nothing, at any value.
MEANINGLESS = ("top_p", "top_k", "min_p", "seed", "user")

# What a row must not decide about rendering: templates come from the model only, and the rest is the renderer's own.
TEMPLATE_RESERVED = (
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
)

_EXPECTED = {
    "id": "a non-empty string",
    "messages": 'a non-empty list of {"role", "content"} objects',
    "content": "a string (lists of content parts are not supported)",
    "prompt": "a non-empty string",
    "roi": f'a non-empty list of selectors, {MAX_SELECTORS} at most, such as {{"role": "system"}} (or leave roi out)',
    "message": "the index of a message, counted from 0",
    "text": "a non-empty string",
    "chars": "a pair of whole numbers [start, end] with 0 <= start < end",
    "weight": "a finite number within float32",
    "max_tokens": f"a whole number from 1 to {INT32_MAX}",
    "min_tokens": f"a whole number from 0 to {INT32_MAX}",
    "stop": "a non-empty string or a list of them",
    "stop_token_ids": "a list of token ids (whole numbers from 0)",
    "chat_template_kwargs": "an object",
}
_EXPECTED_ITEM = {
    "messages": 'an object {"role", "content"}',
    "roi": 'a selector such as {"role": "system"}',
    "stop": "a non-empty string",
    "stop_token_ids": "a token id (a whole number from 0)",
}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _Message(_Strict):
    role: Role
    content: str

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        return {key: value for key, value in message.items() if NEUTRAL_IN_MESSAGE.get(key, ...) != value}


class _Selector(_Strict):
    role: Role | None = None
    message: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None
    text: Annotated[str, Field(min_length=1)] | None = None
    chars: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)] | None = None
    weight: Annotated[float, Field(ge=-FLOAT32_MAX, le=FLOAT32_MAX)] = 1.0

    @model_validator(mode="after")
    def _one_place(self) -> _Selector:
        places = [name for name in ("role", "message", "text", "chars") if getattr(self, name) is not None]
        if not places:
            raise ValueError("names no place; give role, message, text or chars")
        if len(places) > 1 and places not in (["message", "text"], ["message", "chars"]):
            raise ValueError(f"names {' and '.join(places)}; text or chars may stand beside message, nothing else may")
        if self.chars and self.chars[0] >= self.chars[1]:
            raise ValueError(f"chars must be {_EXPECTED['chars']}, not {self.chars}")
        return self

    def record(self) -> Selector:
        return Selector(self.role, self.message, self.text, tuple(self.chars) if self.chars else None, self.weight)


Count = Annotated[int, Field(ge=0, le=INT32_MAX)]


class _Row(_Strict):
    id: Annotated[str, Field(min_length=1)]
    messages: Annotated[list[_Message], Field(min_length=1)] | None = None
    prompt: Annotated[str, Field(min_length=1)] | None = None
    roi: Annotated[list[_Selector], Field(min_length=1, max_length=MAX_SELECTORS)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    min_tokens: Count | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop),
    ] = []
    stop_token_ids: list[Count] = []
    chat_template_kwargs: dict[str, Any] = {}
    metadata: Any = None

    @model_validator(mode="after")
    def _consistent(self) -> _Row:
        if (self.messages is None) == (self.prompt is None):
            given = "neither messages nor prompt" if self.messages is None else "both messages and prompt"
            raise ValueError(f"the row has {given}; give exactly one of them")
        if self.min_tokens is not None and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})")
        if self.prompt is not None and self.chat_template_kwargs:
            raise ValueError("chat_template_kwargs has no use beside prompt, which no template renders; remove it")
        for key in TEMPLATE_RESERVED:
            if key in self.chat_template_kwargs:
                raise ValueError(f"chat_template_kwargs must not set {key}: rendering is the model's and the run's")
        for index, selector in enumerate(self.roi or ()):
            if self.prompt is not None and (selector.role is not None or selector.message is not None):
                raise ValueError(f"roi[{index}] selects messages, but the row has a prompt; give text or chars alone")
            if self.messages is not None and selector.role is None and selector.message is None:
                raise ValueError(f'roi[{index}] names no message; put "message": INDEX beside text or chars')
        return self


def parse_row(obj: Any, line: int) -> InputRow:
    """The row that a JSON value describes, in the project's own form or as a line of an OpenAI batch file.

    `line` is only recorded. A key whose value is null counts as absent, at every depth but in metadata: writers give
    all objects of a column the same keys. Values are never coerced: an id 7 may have been "7" or "007". Metadata that
    JSON cannot hold raises json's TypeError or ValueError: the reader lets none pass.
    Raises:
        RowRefused: with one line that names the key, what is wrong with it and how to mend it. Its type is
            `not_an_object`, `missing_field`, `invalid_field`, `unknown_field`, `unknown_role` or `refused_parameter`.
    """
    if not isinstance(obj, dict):
        raise RowRefused("not_an_object", f"the row must be a JSON object, not {shown(obj)}")
    given = _without_nulls(obj)
    openai = "custom_id" in given or "body" in given
    fields = _openai_fields(given) if openai else given
    metadata = fields.get("metadata")
    fields = {key: value for key, value in fields.items() if key not in MEANINGLESS}
    for key, neutral in NEUTRAL.items():
        if key in fields:
            _require_neutral(key, fields.pop(key), neutral)
    try:
        row = _Row.model_validate(fields)
    except ValidationError as invalid:
        raise _refusal(invalid.errors(include_url=False)[0], openai) from None
    return InputRow(
        id=row.id,
        messages=tuple(message.model_dump() for message in row.messages) if row.messages else None,
        prompt=row.prompt,
        roi=tuple(selector.record() for selector in row.roi) if row.roi else None,
        max_tokens=row.max_tokens,
        min_tokens=row.min_tokens,
        stop=tuple(row.stop),
        stop_token_ids=tuple(row.stop_token_ids),
        chat_template_kwargs=row.chat_template_kwargs,
        metadata=json.dumps(metadata, ensure_ascii=False),
        raw=obj,
        line=line,
    )


def row_id(obj: Any) -> str | None:
    """The id that a JSON value carries, as `id` or as OpenAI's `custom_id`; None where it has none that is valid."""
    names = ("custom_id", "id") if isinstance(obj, dict) else ()
    found = next((obj[name] for name in names if obj.get(name) is not None), None)
    return found if isinstance(found, str) and found else None


def parse_selector_option(text: str) -> tuple[Selector, ...] | None:
    """The value of `--roi`: `role=ROLE`, `message=N` or `text=WORDS` as one selector, `none` as None.

    Raises:
        ValueError: with one line, for anything else.
    """
    if text == "none":
        return None
    kind, _, value = text.partition("=")
    if kind == "role" and value in ROLES:
        return (Selector(role=value),)
    if kind == "message" and value.isascii() and value.isdigit() and len(value) < 10:
        return (Selector(message=int(value)),)
    if kind == "text" and value:
        return (Selector(text=value),)
    raise ValueError(
        f"--roi {shown(text)} is no selector; give role=system (or user, assistant), message=N, text=WORDS or none"
    )


def _without_nulls(value: Any) -> Any:
    """A value without the keys that are null; metadata, of a row or of a body, stays as it is."""
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {key: part if key == "metadata" else _without_nulls(part) for key, part in value.items() if part is not None}


def _openai_fields(obj: dict[str, Any]) -> dict[str, Any]:
    """The fields of a row out of {"custom_id", "method", "url", "body"}."""
    for key in obj:
        if key not in ("custom_id", "method", "url", "body"):
            raise RowRefused("unknown_field", f"unknown key {shown(key)} beside body; put it into body")
    if obj.get("method", "POST") != "POST":
        raise RowRefused("invalid_field", f'method must be "POST", not {shown(obj["method"])}')
    url = obj.get("url")
    if url is not None and not (isinstance(url, str) and url.endswith("/completions")):
        raise RowRefused("invalid_field", f"url must be one of completions, /v1/chat/completions, not {shown(url)}")
    body = obj.get("body")
    if not isinstance(body, dict):
        raise RowRefused("invalid_field", f"body must be an object with messages or prompt, not {shown(body)}")
    if "id" in body:
        raise RowRefused("unknown_field", "body.id is no parameter; the row's id is custom_id")
    fields = {key: value for key, value in body.items() if key not in ("model", "max_completion_tokens")}
    limit = body.get("max_completion_tokens")
    if limit is not None and fields.setdefault("max_tokens", limit) != limit:
        raise RowRefused("invalid_field", "body.max_tokens and body.max_completion_tokens differ; give one")
    if "custom_id" in obj:
        fields["id"] = obj["custom_id"]
    return fields


def _require_neutral(key: str, value: Any, neutral: Any) -> None:
    if value == neutral and isinstance(value, bool) == isinstance(neutral, bool):
        return
    raise RowRefused(
        "refused_parameter",
        f"{key} = {shown(value)} is refused: decoding is deterministic, with no sampling, penalties, tools or output "
        f"constraints; remove {key}",
    )


def _refusal(error: dict[str, Any], openai: bool) -> RowRefused:
    """One of pydantic's errors as one line in the user's terms."""
    *parents, last = error["loc"] or ("",)
    if openai and error["loc"] == ("id",):
        last = "custom_id"
    elif openai:
        parents = ["body", *parents]
    path = place_text([*parents, last])
    if error["type"] == "extra_forbidden":
        if not error["loc"][:-1]:
            return RowRefused("unknown_field", f"unknown key {shown(last)}; put data of your own under metadata")
        known = _Selector if error["loc"][0] == "roi" else _Message
        keys = ", ".join(known.model_fields)
        return RowRefused(
            "unknown_field", f"{place_text(parents)}: unknown key {shown(last)}; the known keys are {keys}"
        )
    name = next((part for part in reversed(error["loc"]) if isinstance(part, str)), "")
    if error["type"] == "missing":
        return RowRefused("missing_field", f"{path} is missing; it must be {_EXPECTED.get(name, 'given')}")
    if error["type"] == "literal_error":
        roles = ", ".join(ROLES)
        return RowRefused("unknown_role", f"{path}: unknown role {shown(error['input'])}; the known roles are {roles}")
    if error["type"] == "value_error":
        place = f"{path} " if error["loc"] else ""
        return RowRefused("invalid_field", f"{place}{error['ctx']['error']}")
    expected = (_EXPECTED_ITEM if isinstance(last, int) and name in _EXPECTED_ITEM else _EXPECTED)[name]
    return RowRefused("invalid_field", f"{path} must be {expected}, not {shown(error['input'])}")
