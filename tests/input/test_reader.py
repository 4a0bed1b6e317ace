"""Rows in: what a row may be, what is refused and how, and files of every kind, good and broken."""

import bz2
import gzip
import http.server
import io
import json
import lzma
import pickle
import threading
import tracemalloc
from dataclasses import replace
from functools import partial

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from agd_vllm.input.files import InputUnusable
from agd_vllm.input.json_text import MAX_ROW_BYTES, row_texts
from agd_vllm.input.reader import check_inputs, check_rows, read_rows
from agd_vllm.input.schema import parse_row, parse_selector_option
from agd_vllm.records import InputRow, RowError, RowRefused, Selector

MESSAGES = [{"role": "system", "content": "Antworte auf Französisch."}, {"role": "user", "content": "Hi"}]
CHAT = {"id": "r1", "messages": MESSAGES}
RAW = {"id": "p1", "prompt": "Once upon"}


def jsonl(path, *lines):
    """Writes lines, given as rows or as bytes, and returns the path."""
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return str(path)


def read(*inputs):
    return list(read_rows(inputs))


def only_error(path):
    (error,) = read(path)
    assert isinstance(error, RowError)
    assert "\n" not in error.message
    return error


# Rows


def test_every_field_of_a_row():
    given = {
        **CHAT,
        "roi": [
            {"role": "system"},
            {"message": 1, "weight": -2},
            {"message": 0, "text": "Franz"},
            {"message": 0, "chars": [0, 4]},
        ],
        "max_tokens": 7,
        "min_tokens": 2,
        "stop": ["\n\n", "END"],
        "stop_token_ids": [0, 5],
        "chat_template_kwargs": {"enable_thinking": False},
        "metadata": {"ü": [1, None, 0.5]},
    }
    row = parse_row(given, 12)
    assert row == InputRow(
        id="r1",
        messages=tuple(MESSAGES),
        roi=(
            Selector(role="system"),
            Selector(message=1, weight=-2),
            Selector(message=0, text="Franz"),
            Selector(message=0, chars=(0, 4)),
        ),
        max_tokens=7,
        min_tokens=2,
        stop=("\n\n", "END"),
        stop_token_ids=(0, 5),
        chat_template_kwargs={"enable_thinking": False},
        metadata='{"ü": [1, null, 0.5]}',
        raw=given,
        line=12,
    )


def test_a_prompt_row_and_its_defaults():
    row = parse_row({**RAW, "stop": "END", "roi": [{"text": "upon"}, {"chars": [0, 4]}]}, 1)
    assert (row.prompt, row.messages, row.stop) == ("Once upon", None, ("END",))
    assert row.roi == (Selector(text="upon"), Selector(chars=(0, 4)))
    bare = parse_row({**RAW, "roi": None, "max_tokens": None}, 1)
    assert (bare.roi, bare.max_tokens, bare.stop, bare.metadata) == (None, None, (), "null")


def test_neutral_parameters_change_nothing():
    neutral = {"temperature": 0.0, "n": 1, "top_p": 0.9, "top_k": 3, "seed": 1, "user": "me", "stream": False}
    neutral |= {"presence_penalty": 0, "repetition_penalty": 1.0, "tools": [], "logprobs": None, "logit_bias": {}}
    row = parse_row({**RAW, **neutral}, 1)
    assert row == InputRow(id="p1", prompt="Once upon", raw={**RAW, **neutral}, line=1)


def test_an_openai_batch_line():
    body = {"model": "gpt", "messages": MESSAGES, "max_completion_tokens": 9, "temperature": 0, "stop": None}
    body |= {"roi": [{"message": 0}], "stop_token_ids": [3], "min_tokens": 1, "metadata": {"k": 1}}
    line = {"custom_id": "c1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    row = parse_row(line, 1)
    assert (row.id, row.messages, row.max_tokens, row.min_tokens) == ("c1", tuple(MESSAGES), 9, 1)
    assert (row.roi, row.stop_token_ids, row.metadata) == ((Selector(message=0),), (3,), '{"k": 1}')
    assert row.raw == line


NOTHING = None  # as SDKs and `datasets` write what is not there
WITH_NULLS = [
    ({**RAW, "topic": NOTHING, "messages": NOTHING, "temperature": NOTHING, "stop": NOTHING, "roi": NOTHING}, RAW),
    (
        {**CHAT, "messages": [{**MESSAGES[0], "refusal": NOTHING, "tool_calls": NOTHING, "name": NOTHING}]},
        {**CHAT, "messages": MESSAGES[:1]},
    ),
    ({**CHAT, "messages": [{**MESSAGES[0], "tool_calls": [], "annotations": []}]}, {**CHAT, "messages": MESSAGES[:1]}),
    (
        {**CHAT, "roi": [{"role": NOTHING, "message": 0, "text": NOTHING, "chars": NOTHING, "weight": NOTHING}]},
        {**CHAT, "roi": [{"message": 0}]},
    ),
    (
        {**CHAT, "chat_template_kwargs": {"enable_thinking": NOTHING, "documents": [{"title": "a", "text": NOTHING}]}},
        {**CHAT, "chat_template_kwargs": {"documents": [{"title": "a"}]}},
    ),
    ({**RAW, "response_format": {"type": "text", "json_schema": NOTHING}, "logit_bias": {"5": NOTHING}}, RAW),
    ({**RAW, "custom_id": NOTHING, "body": NOTHING, "method": NOTHING}, RAW),
    (
        {"custom_id": "p1", "id": NOTHING, "method": NOTHING, "body": {**RAW, "id": NOTHING, "max_tokens": NOTHING}},
        {"custom_id": "p1", "body": {"prompt": RAW["prompt"]}},
    ),
    (
        {"custom_id": "p1", "body": {"prompt": "x", "max_tokens": NOTHING, "max_completion_tokens": 4}},
        {"custom_id": "p1", "body": {"prompt": "x", "max_tokens": 4}},
    ),
    (
        {"custom_id": "p1", "body": {"prompt": "x", "max_tokens": 4, "max_completion_tokens": NOTHING}},
        {"custom_id": "p1", "body": {"prompt": "x", "max_tokens": 4}},
    ),
]


@pytest.mark.parametrize(("given", "same"), WITH_NULLS)
def test_null_is_absent_at_every_place(given, same):
    (row,) = check_rows([given])
    assert row == replace(parse_row(same, 1), raw=given)


def test_nulls_of_metadata_are_data():
    given = {**RAW, "metadata": {"a": None, "b": [{"c": None}]}}
    assert parse_row(given, 1).metadata == '{"a": null, "b": [{"c": null}]}'
    body = {key: given[key] for key in ("prompt", "metadata")}
    assert parse_row({"custom_id": "c", "body": body}, 1).metadata == '{"a": null, "b": [{"c": null}]}'


def test_a_table_written_as_json_lines_holds_the_same_rows_as_parquet(tmp_path):
    """`datasets` gives every object of a column the same keys, in both; also where rows of several forms meet."""
    answered = [*MESSAGES, {"role": "assistant", "content": "Bonjour", "refusal": None}, {**MESSAGES[1]}]
    body = {"messages": MESSAGES, "max_completion_tokens": 4, "response_format": {"type": "text"}}
    table = pa.Table.from_pylist(
        [
            {
                "id": "a",
                "messages": answered,
                "roi": [{"message": 0, "text": "auf", "weight": 2.0}, {"role": "user"}],
                "chat_template_kwargs": {"a": True},
                "body": body,
                "custom_id": "b",
                "max_tokens": 1,
            },
        ]
    ).slice(0, 0)
    rows = [
        {"id": "a", "messages": answered, "roi": [{"message": 0}, {"role": "system", "weight": 3.0}]},
        {"custom_id": "b", "body": body},
        {"custom_id": "c", "body": {"messages": MESSAGES}},
        {"id": "d", "messages": MESSAGES, "chat_template_kwargs": {}},
        {"id": "e", "messages": [{"role": "user", "content": None}], "roi": [{"role": "user"}]},
    ]
    table = pa.Table.from_pylist(rows, schema=table.schema)
    pq.write_table(table, tmp_path / "rows.parquet")
    lines = jsonl(tmp_path / "rows.jsonl", *table.to_pylist())
    assert b"null" in (tmp_path / "rows.jsonl").read_bytes()
    *good, bad = read(lines)
    *same, also_bad = read(str(tmp_path / "rows.parquet"))
    assert [replace(row, raw=None, file=None) for row in good] == [replace(row, raw=None, file=None) for row in same]
    assert [replace(row, raw=None, file=None) for row in good] == [
        replace(parse_row(row, line), raw=None) for line, row in enumerate(rows[:-1], start=1)
    ]
    assert (bad.id, bad.type, bad.message) == (also_bad.id, also_bad.type, also_bad.message)
    assert (bad.id, bad.type) == ("e", "missing_field")


def test_refused_rows_hold_the_id_that_is_not_null():
    rows = [{"custom_id": None, "id": "a", "n": 2}, {"custom_id": "b", "id": None, "n": 2}]
    assert [row.id for row in check_rows(rows)] == ["a", "b"]


REFUSED = [
    (5, "not_an_object", "must be a JSON object, not 5"),
    ([CHAT], "not_an_object", "not a list"),
    ({"prompt": "x"}, "missing_field", "id is missing"),
    ({**RAW, "id": 7}, "invalid_field", "id must be a non-empty string, not 7"),
    ({**RAW, "id": ""}, "invalid_field", "id must be"),
    ({"id": "a"}, "invalid_field", "neither messages nor prompt"),
    ({**CHAT, "prompt": "x"}, "invalid_field", "both messages and prompt"),
    ({**RAW, "prompt": ""}, "invalid_field", "prompt must be a non-empty string"),
    ({"id": "a", "messages": []}, "invalid_field", "messages must be a non-empty list"),
    ({"id": "a", "messages": "Hi"}, "invalid_field", 'not "Hi"'),
    ({"id": "a", "messages": ["Hi"]}, "invalid_field", "messages[0] must be an object"),
    ({"id": "a", "messages": [{"role": "user"}]}, "missing_field", "messages[0].content is missing"),
    ({"id": "a", "messages": [{"role": "developer", "content": ""}]}, "unknown_role", 'unknown role "developer"'),
    ({"id": "a", "messages": [{"role": "tool", "content": ""}]}, "unknown_role", "system, user, assistant"),
    ({"id": "a", "messages": [{"role": "user", "content": [{}]}]}, "invalid_field", "content parts are not supported"),
    ({"id": "a", "messages": [{**MESSAGES[0], "name": "x"}]}, "unknown_field", 'messages[0]: unknown key "name"'),
    ({**CHAT, "roi": []}, "invalid_field", "leave roi out"),
    ({**CHAT, "roi": [{"role": "system"}] * 257}, "invalid_field", "256 at most"),
    ({**CHAT, "roi": {"role": "system"}}, "invalid_field", "roi must be a non-empty list"),
    ({**CHAT, "roi": [{"rol": "system"}]}, "unknown_field", 'roi[0]: unknown key "rol"'),
    ({**CHAT, "roi": [{"role": "tool"}]}, "unknown_role", "roi[0].role"),
    ({**CHAT, "roi": [{"weight": 1}]}, "invalid_field", "roi[0] names no place"),
    ({**CHAT, "roi": [{"role": "user", "message": 1}]}, "invalid_field", "names role and message"),
    ({**CHAT, "roi": [{"message": 0, "text": "a", "chars": [0, 1]}]}, "invalid_field", "names message and text and"),
    ({**CHAT, "roi": [{"message": -1}]}, "invalid_field", "roi[0].message must be the index"),
    ({**CHAT, "roi": [{"message": True}]}, "invalid_field", "not true"),
    ({**CHAT, "roi": [{"message": 0, "text": ""}]}, "invalid_field", "roi[0].text"),
    ({**CHAT, "roi": [{"message": 0, "chars": [4, 4]}]}, "invalid_field", "0 <= start < end, not [4, 4]"),
    ({**CHAT, "roi": [{"message": 0, "chars": [-1, 4]}]}, "invalid_field", "0 <= start < end"),
    ({**CHAT, "roi": [{"message": 0, "chars": [1, 2, 3]}]}, "invalid_field", "a pair of whole numbers"),
    ({**CHAT, "roi": [{"message": 0, "weight": 1e39}]}, "invalid_field", "roi[0].weight must be a finite number"),
    ({**CHAT, "roi": [{"message": 0, "weight": "1"}]}, "invalid_field", "roi[0].weight"),
    ({**CHAT, "roi": [{"text": "Franz"}]}, "invalid_field", "roi[0] names no message"),
    ({**RAW, "roi": [{"role": "system"}]}, "invalid_field", "the row has a prompt"),
    ({**RAW, "roi": [{"message": 0, "text": "a"}]}, "invalid_field", "the row has a prompt"),
    ({**RAW, "max_tokens": 0}, "invalid_field", "max_tokens must be a whole number from 1"),
    ({**RAW, "max_tokens": 16.0}, "invalid_field", "not 16.0"),
    ({**RAW, "max_tokens": True}, "invalid_field", "max_tokens"),
    ({**RAW, "max_tokens": 2**31}, "invalid_field", "2147483647"),
    ({**RAW, "min_tokens": -1}, "invalid_field", "min_tokens must be a whole number from 0"),
    ({**RAW, "min_tokens": 3, "max_tokens": 2}, "invalid_field", "min_tokens (3) is above max_tokens (2)"),
    ({**RAW, "stop": 5}, "invalid_field", "stop must be"),
    ({**RAW, "stop": ["a", ""]}, "invalid_field", "stop[1]"),
    ({**RAW, "stop_token_ids": 5}, "invalid_field", "stop_token_ids must be a list"),
    ({**RAW, "stop_token_ids": [1, -1]}, "invalid_field", "stop_token_ids[1]"),
    ({**CHAT, "chat_template_kwargs": 1}, "invalid_field", "chat_template_kwargs must be an object"),
    ({**CHAT, "chat_template_kwargs": {"chat_template": "x"}}, "invalid_field", "must not set chat_template"),
    ({**RAW, "chat_template_kwargs": {"a": 1}}, "invalid_field", "no use beside prompt"),
    ({**RAW, "topic": "x"}, "unknown_field", 'unknown key "topic"; put data of your own under metadata'),
    ({**RAW, "temperature": 0.7}, "refused_parameter", "temperature = 0.7 is refused: decoding is deterministic"),
    ({**RAW, "n": 2}, "refused_parameter", "n = 2"),
    ({**RAW, "n": True}, "refused_parameter", "n = true"),
    ({**RAW, "frequency_penalty": 0.1}, "refused_parameter", "frequency_penalty"),
    ({**RAW, "presence_penalty": -1}, "refused_parameter", "presence_penalty"),
    ({**RAW, "repetition_penalty": 1.1}, "refused_parameter", "repetition_penalty"),
    ({**RAW, "tools": [{}]}, "refused_parameter", "tools"),
    ({**RAW, "tool_choice": "auto"}, "refused_parameter", "tool_choice"),
    ({**RAW, "logprobs": True}, "refused_parameter", "logprobs"),
    ({**RAW, "response_format": {"type": "json_object"}}, "refused_parameter", "response_format"),
    ({**RAW, "logit_bias": {"5": 1}}, "refused_parameter", "logit_bias"),
    ({**RAW, "best_of": 2}, "refused_parameter", "best_of"),
    ({**RAW, "use_beam_search": True}, "refused_parameter", "use_beam_search"),
    ({"custom_id": 5, "body": {"prompt": "x"}}, "invalid_field", "custom_id must be a non-empty string"),
    ({"custom_id": "a"}, "invalid_field", "body must be an object"),
    ({"custom_id": "a", "body": {"prompt": "x", "id": "b"}}, "unknown_field", "custom_id"),
    ({"custom_id": "a", "id": "b", "body": {"prompt": "x"}}, "unknown_field", 'unknown key "id" beside body'),
    ({"custom_id": "a", "method": "GET", "body": {"prompt": "x"}}, "invalid_field", "method must be"),
    ({"custom_id": "a", "url": "/v1/embeddings", "body": {"prompt": "x"}}, "invalid_field", "url must be"),
    ({"custom_id": "a", "body": {"prompt": ["x"]}}, "invalid_field", "body.prompt must be"),
    ({"custom_id": "a", "body": {"prompt": "x", "temperature": 1}}, "refused_parameter", "temperature"),
    ({"custom_id": "a", "body": RAW}, "unknown_field", "body.id"),
    (
        {"custom_id": "a", "body": {"prompt": "x", "max_tokens": 1, "max_completion_tokens": 2}},
        "invalid_field",
        "differ",
    ),
]


@pytest.mark.parametrize(("given", "type", "words"), REFUSED)
def test_refused_rows_say_what_and_where(given, type, words):
    with pytest.raises(RowRefused) as refused:
        parse_row(given, 1)
    assert refused.value.type == type
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_messages_stay_short_and_on_one_line():
    with pytest.raises(RowRefused) as refused:
        parse_row({**RAW, "k\n" * 1000: 1}, 1)
    assert len(str(refused.value)) < 200
    assert "\n" not in str(refused.value)


def test_selector_options():
    assert parse_selector_option("role=system") == (Selector(role="system"),)
    assert parse_selector_option("message=2") == (Selector(message=2),)
    assert parse_selector_option("text=a=b") == (Selector(text="a=b"),)
    assert parse_selector_option("none") is None


@pytest.mark.parametrize("text", ["", "system", "role=tool", "message=-1", "message=x", "message=", "text=", "None"])
def test_bad_selector_options(text):
    with pytest.raises(ValueError, match=r"^--roi .* is no selector; give role=system.*none$"):
        parse_selector_option(text)


# Lines


@pytest.mark.parametrize(
    ("line", "type", "words", "id"),
    [
        (b'{"id": "a", "prompt": ', "invalid_json", "the line is not JSON", None),
        (b"hello", "invalid_json", "character 1", None),
        (b"[1, 2]", "not_an_object", "not a list", None),
        (b'{"id": "a", "prompt": "x", "prompt": "y"}', "invalid_json", "names the key prompt twice", "a"),
        (b'{"id": "a", "prompt": "x", "id": "b"}', "invalid_json", "names the key id twice", None),
        (b'{"id": "a", "metadata": {"b": 1, "b": 1}}', "invalid_json", "names the key b twice", "a"),
        (b'{"id": "a", "prompt": "caf\xe9"}', "invalid_utf8", "byte 27", "a"),
        (b'{"id": "caf\xe9", "prompt": "x"}', "invalid_utf8", "byte 12", None),
        (b'{"id": "a", "prompt": "\\ud83d"}', "lone_surrogate", "prompt has a lone surrogate", "a"),
        (b'{"id": "\\udc00", "prompt": "x"}', "lone_surrogate", "id has a lone surrogate", None),
        (b'{"id": "a", "metadata": {"\\ud83d": 1}}', "lone_surrogate", "a key of metadata has a lone surrogate", "a"),
        (b'{"id": "a", "metadata": NaN}', "not_json", "metadata is NaN", "a"),
        (b'{"custom_id": "a", "body": {"n": [0, -Infinity]}}', "not_json", "body.n[1] is NaN or a number out", "a"),
        (b'{"id": "a", "metadata": [1e999]}', "not_json", "metadata[0] is NaN or a number out of range", "a"),
        (b'{"id": "a", "metadata": {"a b": NaN}}', "not_json", 'metadata["a b"] is NaN', "a"),
        (b'{"id": NaN}', "not_json", "id is NaN", None),
        (b"NaN", "not_json", "the row is NaN", None),
        (b'{"id": "a", "metadata": ' + b"9" * 5000 + b"}", "not_json", "digits", "a"),
        (b'{"id": "a", "metadata": ' + b"9" * 3000 + b"}", "not_json", "metadata is an integer of more than", "a"),
        (b'{"id": "a", "metadata": ' + b"[" * 100 + b"]" * 100 + b"}", "too_deep", "100 levels", "a"),
        (b'{"id": "a", "metadata": ' + b'{"a":' * 200_000, "too_deep", "100 levels", None),
    ],
)
def test_a_bad_line_is_an_error_of_that_row_only(tmp_path, line, type, words, id):
    path = jsonl(tmp_path / "rows.jsonl", {**RAW, "id": "before"}, b"", line, {**RAW, "id": "after"})
    before, error, after = read(path)
    assert (before.id, before.line, after.id, after.line) == ("before", 1, "after", 4)
    assert (error.line, error.type, error.id) == (3, type, id)
    assert words in error.message
    assert "\n" not in error.message
    assert error.input == (json.loads(line) if type == "not_an_object" else line.decode(errors="backslashreplace"))
    json.dumps(error.input, ensure_ascii=False).encode()


def test_a_row_of_which_only_the_id_can_be_read_holds_it(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", b'{"id": "p1", "metadata": NaN}', RAW, RAW, b'{"id": "p1", "metadata": NaN}')
    assert [(row.id, row.type) for row in read(path)] == [("p1", "not_json"), *[("p1", "duplicate_id")] * 3]


def test_an_error_carries_the_row_and_its_id(tmp_path):
    error = only_error(jsonl(tmp_path / "rows.jsonl", {**RAW, "n": 3}))
    assert (error.input, error.id, error.line) == ({**RAW, "n": 3}, "p1", 1)


def test_physical_lines_blank_lines_crlf_and_no_newline_at_the_end(tmp_path):
    row = json.dumps(RAW).encode()
    (tmp_path / "rows.jsonl").write_bytes(b"\n  \r\n" + row + b"\r\n\n" + row.replace(b"p1", b"p2"))
    assert [(row.id, row.line) for row in read(str(tmp_path / "rows.jsonl"))] == [("p1", 3), ("p2", 5)]


def test_a_byte_order_mark_at_the_start_of_each_file(tmp_path):
    first = jsonl(tmp_path / "1.jsonl", b"\xef\xbb\xbf" + json.dumps(RAW).encode())
    second = jsonl(tmp_path / "2.jsonl", b"\xef\xbb\xbf" + json.dumps(CHAT).encode())
    assert [row.id for row in read(first, second)] == ["p1", "r1"]


def test_ids_are_unique_over_all_inputs_and_refused_rows_hold_theirs(tmp_path):
    first = jsonl(tmp_path / "1.jsonl", RAW, {**RAW, "id": "bad", "n": 2})
    second = jsonl(tmp_path / "2.jsonl", {**RAW, "id": "bad"}, {"custom_id": "p1", "body": {"prompt": "x"}}, CHAT)
    rows = read(first, second)
    assert [(row.id, getattr(row, "type", "valid")) for row in rows] == [
        ("p1", "valid"),
        ("bad", "refused_parameter"),
        ("bad", "duplicate_id"),
        ("p1", "duplicate_id"),
        ("r1", "valid"),
    ]


def test_lines_up_to_the_limit_are_rows_and_longer_ones_are_refused_without_being_held(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = json.dumps(RAW).encode()
    with path.open("wb") as file:
        file.write(row + b" " * (MAX_ROW_BYTES - len(row)) + b"\n" + b"[" * 5000)
        file.truncate(file.tell() + 3 * MAX_ROW_BYTES)  # a hole: nothing on the disk
        file.seek(0, io.SEEK_END)
        file.write(b"\n" + json.dumps(CHAT).encode() + b"\n" + b"x" * (MAX_ROW_BYTES + 1))
    fitting, oversized, after, last = read(str(path))
    assert (fitting.id, after.id, after.line) == ("p1", "r1", 3)
    assert (oversized.type, oversized.line, oversized.input) == ("line_too_long", 2, "[" * 2000)
    assert (last.type, last.line, last.input) == ("line_too_long", 4, "x" * 2000)
    path.write_bytes(b'{"')
    with path.open("r+b") as file:
        file.truncate(10 * MAX_ROW_BYTES)
    tracemalloc.start()
    (error,) = read(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.type == "line_too_long"
    assert peak < 2 * MAX_ROW_BYTES


def test_rows_in_memory():
    cycle = {**RAW, "id": "cycle", "metadata": []}
    cycle["metadata"].append(cycle["metadata"])
    key, surrogate = {**RAW, "id": "key", 1: 2}, {**RAW, "id": "surrogate", "prompt": "\ud800"}
    odd = {**RAW, "id": "odd", "metadata": {1, 2}}
    good, duplicate, *refused = check_rows([RAW, RAW, odd, cycle, key, surrogate, None])
    assert (good.id, good.line, duplicate.type, duplicate.line) == ("p1", 1, "duplicate_id", 2)
    assert [error.type for error in refused] == ["not_json", "too_deep", "not_json", "lone_surrogate", "not_an_object"]
    assert [error.id for error in refused] == ["odd", "cycle", "key", "surrogate", None]
    assert "metadata is of type set" in refused[0].message
    json.dumps([error.input for error in refused], ensure_ascii=False).encode()


@pytest.mark.parametrize("value", [np.arange(3), np.int64(5), (1, 2), b"x", {1: 2}, object()], ids=type)
def test_what_json_has_not_is_named_with_its_place(value):
    good = {"a": [1, np.float64(2.5), np.str_("x")]}
    fine, error = check_rows([{**RAW, "metadata": good}, {**RAW, "id": "r", "metadata": {**good, "b": [value]}}])
    assert fine.metadata == '{"a": [1, 2.5, "x"]}'
    assert (error.id, error.type) == ("r", "not_json")
    assert error.message.startswith("metadata.b[0] ")
    json.dumps(error.input, allow_nan=False)


def test_a_place_is_short_and_on_one_line_whatever_the_keys():
    value = float("nan")
    for _ in range(90):
        value = {"long\nkey" * 40: value}
    (error,) = check_rows([{**RAW, "metadata": value}])
    assert error.message.startswith('metadata["long\\nkey')
    assert len(error.message) < 400
    assert "\n" not in error.message


# Files


PACK = {"gz": gzip.compress, "zst": zstandard.compress, "bz2": bz2.compress, "xz": partial(lzma.compress, preset=0)}
PACK["lzma"] = partial(lzma.compress, preset=0, format=lzma.FORMAT_ALONE)
SUFFIXES = ("jsonl", *PACK)


def compressed(data, suffix):
    """Two members, frames or streams, as parallel compressors and `cat` make them; plain under another suffix."""
    half = len(data) // 2
    return PACK[suffix](data[:half]) + PACK[suffix](data[half:]) if suffix in PACK else data


def many(count, padding=0):
    rows = ({"id": f"r{i}", "prompt": f"{i * 7919 % count:08d}" + "x" * padding} for i in range(count))
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("place", ["local", "url", "memory"])
def test_plain_and_compressed_files_anywhere(tmp_path, suffix, place):
    data = compressed(many(300), suffix)
    url = f"memory://test_reader/rows.{suffix}" if place == "memory" else str(tmp_path / f"rows.{suffix}")
    with fsspec.open(url, "wb") as file:
        file.write(data)
    url = f"file://{url}" if place == "url" else url
    check_inputs([url])
    assert [(row.id, row.line) for row in read(url)] == [(f"r{i}", i + 1) for i in range(300)]


@pytest.mark.parametrize("kind", [*SUFFIXES, "parquet"])
@pytest.mark.parametrize("name", ["rows", "rows.jsonl", "rows.GZ", "rows.zst", "rows.bz2.part", "rows.PARQUET"])
def test_what_a_file_is_its_first_bytes_say(tmp_path, kind, name):
    path = tmp_path / name
    if kind == "parquet":
        parquet(path, id=pa.array(["r0", "r1"]))
    else:
        path.write_bytes(compressed(many(2), kind))
    check_inputs([str(path)])
    assert [(row.id, row.line) for row in read(str(path))] == [("r0", 1), ("r1", 2)]


def test_padding_and_skippable_frames_between_packed_parts(tmp_path):
    path = tmp_path / "rows"
    first, second = many(2), many(4)[len(many(2)) :]
    path.write_bytes(lzma.compress(first) + b"\0" * 8 + lzma.compress(second) + b"\0" * 4)
    assert [row.id for row in read(str(path))] == ["r0", "r1", "r2", "r3"]
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0size"  # pzstd writes one before each frame
    path.write_bytes(b"".join(skippable + zstandard.compress(part) for part in (first, second)))
    assert [row.id for row in read(str(path))] == ["r0", "r1", "r2", "r3"]


# Arrays


ROWS = [{**RAW, "prompt": 'a "quoted] \\ {\n[x,'}, {**CHAT, "metadata": [{"a": [1, "é]"]}, []]}, {**RAW, "id": "p2"}]


@pytest.mark.parametrize("indent", [None, 0, 1])
@pytest.mark.parametrize("start", ["", " \r\n\n", "\ufeff", "\ufeff\n" + " " * 5000])
@pytest.mark.parametrize("suffix", ["json", "gz", "jsonl"])
def test_an_array_of_rows(tmp_path, indent, start, suffix):
    path = tmp_path / f"rows.{suffix}"
    text = start + json.dumps(ROWS, indent=indent) + "\n \n"
    path.write_bytes(compressed(text.encode(), suffix))
    check_inputs([str(path)])
    rows = read(str(path))
    lines = [text[: text.index(f'"id": "{row["id"]}"')].count("\n") + 1 for row in ROWS]
    lines = [line - 1 if indent is not None else line for line in lines]  # the brace stands on a line of its own
    assert rows == [replace(parse_row(row, line), file=str(path)) for row, line in zip(ROWS, lines, strict=True)]


def test_a_bad_element_is_an_error_of_that_row_only(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(
        b'[{"id": "a", "prompt": "x"},\n 7,\n {"id": "b", "prompt": },\n {"id": "c", "metadata": NaN}, "]",,\n'
        b' {"id": "d", "prompt": "x"} {"id": "a", "prompt": "x"}, nul, ["e"]\n, {"id": "f", "prompt": "caf\xe9"},]\n'
    )
    found = [(row.line, row.id, getattr(row, "type", "valid")) for row in read(str(path))]
    assert found == [
        (1, "a", "valid"),
        (2, None, "not_an_object"),
        (3, None, "invalid_json"),
        (4, "c", "not_json"),
        (4, None, "not_an_object"),
        (5, "d", "valid"),
        (5, "a", "duplicate_id"),
        (5, None, "invalid_json"),
        (5, None, "not_an_object"),
        (6, "f", "invalid_utf8"),
    ]
    bad = read(str(path))[2]
    assert bad.input == '{"id": "b", "prompt": }'
    assert bad.message == "the row is not JSON: Expecting value at character 23; repair this element of the array"


def test_lines_after_an_array_are_rows_and_nothing_is_lost(tmp_path):
    row = json.dumps(RAW).encode()
    rest, after = read(jsonl(tmp_path / "rows.jsonl", b"[]" + row, row.replace(b"p1", b"p2")))
    assert (rest.type, rest.line, rest.id, rest.input) == ("invalid_json", 1, "p1", row.decode())
    assert "continues after the end of the array" in rest.message
    assert (after.id, after.line) == ("p2", 2)
    both, other = (b'[{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "x"}] ', row)
    assert [(row.id, row.line) for row in read(jsonl(tmp_path / "rows.jsonl", both, other))] == [
        ("a", 1),
        ("b", 1),
        ("p1", 2),
    ]


@pytest.mark.parametrize("line", [b"[]", b"[ ]", b'[1, "]"]', b"[null", b'[["a"]]', b"[ \t["])
@pytest.mark.parametrize("before", [b"", b"\n \n"])
def test_a_line_that_is_a_list_of_no_objects_is_one_bad_row(tmp_path, line, before):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(before + line + b"\n\n" + json.dumps(RAW).encode())
    bad, good = read(str(path))
    assert (bad.line, good.id, good.line) == (1 + before.count(b"\n"), "p1", 3 + before.count(b"\n"))
    assert bad.type in ("not_an_object", "invalid_json")


@pytest.mark.parametrize("end", [b"", b",", b', {"id": "b"', b', "b', b", 7", b',{"id": "\\'])
def test_an_array_that_is_not_closed_ends_the_run_after_the_rows_before(tmp_path, end):
    path = tmp_path / "rows.json"
    path.write_bytes(b"[" + json.dumps(RAW).encode() + end)
    check_inputs([str(path)])
    rows = read_rows([str(path)])
    assert next(rows).id == "p1"
    with pytest.raises(InputUnusable, match=r"breaks off: the JSON array .* is not closed; complete it"):
        next(rows)


def test_arrays_one_after_another_are_read_to_the_last(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS[:1]) + json.dumps(ROWS[1:2], indent=1) + "\n[]\n\n" + json.dumps(ROWS[2:]) + "\n")
    found = read(str(path))
    assert [row.id for row in found] == [row["id"] for row in ROWS]
    assert found[0].line == 1 and found[2].line == path.read_text().count("\n")


@pytest.mark.parametrize("indent", [0, 2, "\t"])
def test_objects_over_several_lines_are_read_as_jq_writes_them(tmp_path, indent):
    path = tmp_path / "rows.json"
    texts = [json.dumps(row, indent=indent) for row in ROWS]
    path.write_text("\n" + "\n".join(texts))
    assert [(row.id, row.line) for row in read(str(path))] == [
        (row["id"], 2 + sum(text.count("\n") + 1 for text in texts[:place])) for place, row in enumerate(ROWS)
    ]


def test_among_objects_over_several_lines_a_bad_one_is_an_error_of_its_own(tmp_path):
    good = [json.dumps({**RAW, "id": name}, indent=1) for name in "ab"]
    path = tmp_path / "rows.json"
    path.write_text("\n".join((good[0], '{\n "id": "x",\n "prompt": }', "7", "]", good[1], '{\n "id": "cut"')))
    found = [(getattr(row, "type", "valid"), row.line) for row in read(str(path))]
    assert [kind for kind, _ in found] == [
        "valid",
        "invalid_json",
        "not_an_object",
        "invalid_json",
        "valid",
        "invalid_json",
    ]
    assert [line for _, line in found][1:4] == [5, 8, 9]


def test_a_line_that_breaks_off_stays_one_bad_line(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", b'{"id": "x", ', json.dumps(RAW).encode())
    bad, good = read(path)
    assert (bad.type, bad.line, good.id, good.line) == ("invalid_json", 1, "p1", 2)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('"\\[]{},:\n é🤖a'),
    lambda parts: st.lists(parts) | st.dictionaries(st.text('"\\[]{}a'), parts),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(VALUES.filter(lambda value: not isinstance(value, int))), st.sampled_from([0, 2]), st.integers(1, 9))
def test_values_are_found_wherever_chunks_end(values, indent, size):
    values.insert(0, {"a": 1})
    text = "\n".join(json.dumps(value, indent=indent) for value in values).encode()
    chunks = [text[:12], *(text[start : start + size] for start in range(12, len(text), size))]
    rows = [row for row in row_texts(iter(chunks)) if row.text.strip()]
    assert {row.form for row in rows} == {"value"}
    assert [json.loads(row.text) for row in rows] == values


@settings(max_examples=300, deadline=None)
@given(st.lists(VALUES), st.sampled_from([None, 0, 2]), st.integers(1, 9), st.booleans())
def test_elements_are_found_wherever_chunks_end(values, indent, size, escaped):
    values.insert(0, {})
    text = json.dumps(values, indent=indent, ensure_ascii=escaped).encode()
    chunks = [text[start : start + size] for start in range(0, len(text), size)]
    rows = list(row_texts(iter(chunks)))
    elements = [row for row in rows if row.form == "element"]
    assert [json.loads(row.text) for row in elements] == values
    assert not any(row.text.strip() for row in rows if row.form != "element")
    at = 0
    for row in elements:
        at = text.index(row.text, at)
        assert row.line == text.count(b"\n", 0, at) + 1
        at += len(row.text)


def test_an_element_beyond_the_limit_is_not_held(tmp_path):
    path = tmp_path / "rows.json"
    row = json.dumps(RAW).encode()
    long = b'{"id": "\\"' + b"[\n" * (MAX_ROW_BYTES // 2) + b'"}'
    path.write_bytes(b"[" + row + b",\n" + long + b",\n" + row.replace(b"p1", b"p2") + b"]")
    tracemalloc.start()
    first, oversized, last = read(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (first.id, last.id, last.line) == ("p1", "p2", 3 + MAX_ROW_BYTES // 2)
    assert (oversized.type, oversized.line, oversized.input) == ("line_too_long", 2, long[:2000].decode())
    assert peak < 2 * MAX_ROW_BYTES


def test_parquet_rows_are_the_same_rows(tmp_path):
    rows = [
        {**CHAT, "roi": [{"role": "system"}, {"message": 0, "text": "Franz", "weight": 0.5}], "stop": ["x"]},
        {**RAW, "max_tokens": 5, "metadata": {"a": {"b": 1}}},
        {"id": "bad", "prompt": "x", "max_tokens": 0},
    ]
    path = str(tmp_path / "rows.parquet")
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.Table.from_pylist([rows[0] | rows[1]]).schema), path)
    check_inputs([path])
    chat, raw, bad = read(path)
    assert chat == replace(parse_row(rows[0], 1), file=path)
    assert raw == replace(parse_row(rows[1], 2), file=path)
    assert (bad.file, bad.line, bad.id, bad.type, bad.input) == (path, 3, "bad", "invalid_field", rows[2])


def parquet(path, **columns):
    """Rows with these columns, as many as the longest has, with ids and prompts where none are given."""
    count = max(map(len, columns.values()))
    fill = {"id": pa.array([f"r{i}" for i in range(count)]), "prompt": pa.array(["x"] * count)}
    pq.write_table(pa.table({**fill, **columns}), path)
    return str(path)


def test_parquet_values_that_json_has_not(tmp_path):
    path = tmp_path / "rows.parquet"
    not_a_number = pa.array([None, None, float("nan"), 2.5])
    torn = pa.array([b"x", b"\xff", b"y", b"z"]).view(pa.string())
    good, not_utf8, nan, fine = read(parquet(path, prompt=torn, metadata=not_a_number))
    assert (good.id, good.metadata, fine.metadata) == ("r0", "null", "2.5")
    assert (not_utf8.line, not_utf8.type, not_utf8.id, not_utf8.input) == (2, "unreadable_value", "r1", {"id": "r1"})
    assert "column prompt" in not_utf8.message
    assert (nan.type, nan.id) == ("not_json", "r2")
    assert nan.message.startswith("metadata is NaN")
    json.dumps(nan.input, allow_nan=False)
    (no_id, *_) = read(parquet(path, id=torn.slice(1, 3)))
    assert (no_id.type, no_id.id, no_id.input) == ("unreadable_value", None, {"prompt": "x"})
    blobs = pa.array([{"a": [b"x"]}], pa.struct([("a", pa.list_(pa.binary()))]))
    (blob,) = read(parquet(path, metadata=blobs))
    assert (blob.type, blob.id) == ("not_json", "r0")
    assert blob.message.startswith("metadata.a[0] is of type bytes")
    when = pa.array([1_700_000_000_000_000_001], pa.timestamp("ns"))
    assert read(parquet(path, metadata=when))[0].metadata == '"2023-11-14 22:13:20.000000001"'
    seconds = pa.array([1_700_000_000], pa.timestamp("s"))
    assert read(parquet(path, metadata=seconds))[0].metadata == '"2023-11-14 22:13:20"'


MAPS = [
    (pa.map_(pa.string(), pa.int32()), [("a", 1), ("b", None)], '{"a": 1, "b": null}'),
    (pa.map_(pa.string(), pa.map_(pa.int32(), pa.list_(pa.float64()))), [("a", [(7, [0.5])])], '{"a": {"7": [0.5]}}'),
    (pa.struct([("m", pa.map_(pa.date32(), pa.string()))]), {"m": [(19000, "x")]}, '{"m": {"2022-01-08": "x"}}'),
    (pa.list_(pa.map_(pa.string(), pa.string())), [[("k", "v")], []], '[{"k": "v"}, {}]'),
    (pa.map_(pa.string(), pa.string()), [], "{}"),
]


@pytest.mark.parametrize(("kind", "value", "expected"), MAPS)
def test_a_parquet_map_is_an_object(tmp_path, kind, value, expected):
    (row,) = read(parquet(tmp_path / "rows.parquet", metadata=pa.array([value], kind)))
    assert row.metadata == expected


def test_parquet_maps_that_are_no_object(tmp_path):
    path = tmp_path / "rows.parquet"
    (twice,) = read(parquet(path, metadata=pa.array([[("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int32()))))
    assert (twice.id, twice.type) == ("r0", "unreadable_value")
    assert "column metadata" in twice.message and "key twice" in twice.message
    fields = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    (fields_twice,) = read(parquet(path, metadata=fields))
    assert (fields_twice.id, fields_twice.type) == ("r0", "unreadable_value")
    (odd,) = read(parquet(path, metadata=pa.array([[(b"a", 1)]], pa.map_(pa.binary(), pa.int32()))))
    assert (odd.id, odd.type) == ("r0", "not_json")
    assert odd.message.startswith("metadata has a key that is no string")
    kwargs = pa.array([[("enable_thinking", False)], []], pa.map_(pa.string(), pa.bool_()))
    chat = pa.array([MESSAGES, MESSAGES])
    rows = read(parquet(path, chat_template_kwargs=kwargs, messages=chat, prompt=pa.array([None, None], pa.string())))
    assert [row.chat_template_kwargs for row in rows] == [{"enable_thinking": False}, {}]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_large_file_is_streamed(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(compressed(many(10_000, 4000), suffix))
    tracemalloc.start()
    rows = sum(isinstance(row, InputRow) for row in read_rows([str(path)]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == 10_000
    assert peak < 8 << 20 < 10_000 * 4000


def test_a_large_row_group_is_streamed(tmp_path):
    path = str(tmp_path / "rows.parquet")
    prompts = [f"{i:06d}" * 2000 for i in range(5000)]
    table = pa.table({"id": [f"r{i}" for i in range(5000)], "prompt": prompts})
    pq.write_table(table, path, row_group_size=5000, compression="none", use_dictionary=False)
    del table
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    peak = max(pa.total_allocated_bytes() for _ in read_rows([path])) - before + tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20 < 5000 * 12_000


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("fault", ["truncated", "corrupt", "second"])
def test_a_file_that_breaks_off_ends_the_run_after_the_rows_before(tmp_path, suffix, fault):
    data = compressed(many(80_000, 10), suffix)
    path = tmp_path / f"rows.{suffix}"
    cut = len(data) * 9 // 10
    if fault == "second":  # a whole first part, and what follows it is none
        data, cut = PACK[suffix](many(80_000, 10)), 0
        path.write_bytes(data + b"\0xx" + data[3:])
    else:
        path.write_bytes(data[:cut] if fault == "truncated" else data[:cut] + b"\xff" * 50 + data[cut + 50 :])
    check_inputs([str(path)])
    rows = []
    with pytest.raises(InputUnusable, match=r"^input .*rows\.\w+ cannot be read: .+; repair or replace it$"):
        rows.extend(read_rows([str(path)]))
    assert len(rows) > 10_000
    assert all(isinstance(row, InputRow) for row in rows)


def test_a_parquet_file_with_a_broken_page(tmp_path):
    path = tmp_path / "rows.parquet"
    table = pa.table({"id": [f"r{i}" for i in range(1000)], "prompt": ["x" * 500 + str(i) for i in range(1000)]})
    pq.write_table(table, path, row_group_size=500)
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(1).dictionary_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    check_inputs([str(path)])
    rows = []
    with pytest.raises(InputUnusable, match="cannot be read"):
        rows.extend(read_rows([str(path)]))
    assert len(rows) >= 256  # a batch


def in_parquet(names):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array(["x"])] * len(names), names=names), file)
    return file.getvalue()


# Without the time, which gzip would write into the names of the tests: workers of pytest-xdist must agree on these.
@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("missing.jsonl", None, "does not exist"),
        ("missing.parquet", None, "does not exist"),
        ("empty.jsonl", b"", "is empty"),
        ("blank.jsonl", b"\n \r\n\n", "is empty"),
        ("bom.jsonl", b"\xef\xbb\xbf", "is empty"),
        ("empty.gz", gzip.compress(b"", mtime=0), "is empty"),
        ("empty.zst", b"", "is empty"),
        ("empty.parquet", b"", "is empty"),
        ("empty.json", b"[\n ]\n", "is empty"),
        ("cut.zst", zstandard.compress(b"x" * 100)[:-3], "cannot be read"),
        ("cut.parquet", b"PAR1" + b"x" * 100, "cannot be read"),
        ("cut.xz", lzma.compress(b"x" * 100)[:-3], "cannot be read"),
        ("page.GZ", b"<html>", "neither JSON nor Parquet"),
        ("torn.parquet", b"x" * 100, "begins with 78 78 78 78"),
        ("utf16", '{"id": "a"}'.encode("utf-16"), "is UTF-16"),
        ("utf16be", '\ufeff{"id": "a"}'.encode("utf-16-be"), "is UTF-16"),
        ("utf16.jsonl", '{"id": "é"}'.encode("utf-16-le"), "save it as UTF-8"),
        ("utf16be.jsonl", '\r\n{"id": "é"}'.encode("utf-16-be"), "save it as UTF-8"),
        ("utf32.jsonl", '{"id": "é"}'.encode("utf-32"), "save it as UTF-8"),
        ("utf16.gz", gzip.compress('{"id": "é"}'.encode("utf-16"), mtime=0), "is UTF-16 or UTF-32 within gzip"),
        ("rows.zip", b"PK\x03\x04\x14\0\0\0", "begins with 50 4b 03 04; convert or unpack it"),
        ("rows.npy", b"\x93NUMPY\x01\0", "neither JSON nor Parquet"),
        ("rows.lz4", b"\x04\x22\x4d\x18\x64\x40\xa7", "neither JSON nor Parquet"),
        ("rows.pickle", pickle.dumps([RAW]), "neither JSON nor Parquet"),
        ("twice.gz", gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0), "begins with 1f 8b 08 00 within gzip"),
        ("parquet.bz2", bz2.compress(b"PAR1" + b"x" * 100), "begins with 50 41 52 31 within bz2"),
        ("rows.csv", b"name,prompt\na,b\n", "is a table (CSV); convert it to Parquet: python -c"),
        ("rows.txt", b'"id","prompt"\n"a","b"\n', "is a table (CSV)"),
        ("rows", b"prompt\tid\tmax_tokens\nx\ta\t3\n", "is a table (CSV)"),
        ("rows.csv.gz", gzip.compress(b"id;prompt\na;b\n", mtime=0), "is a table (CSV)"),
        ("columns.parquet", in_parquet(["id", "prompt", "prompt"]), "two columns that are named prompt"),
        ("", None, "is a directory"),
    ],
)
def test_unusable_inputs_are_known_before_the_run(tmp_path, name, data, words):
    good = jsonl(tmp_path / "good.jsonl", RAW)
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputUnusable) as unusable:
        check_inputs([good, str(tmp_path / name)])
    assert words in str(unusable.value)
    assert str(tmp_path / name) in str(unusable.value)
    assert "\n" not in str(unusable.value)


@pytest.mark.parametrize(
    "first", [b"caf\xe9", b"\x1b[1m" + b"caf\xc3\xa9 " * 999, b'{"id": "a\0"}', b"x" * 4095 + "é".encode()]
)
def test_a_bad_first_line_makes_no_binary_file(tmp_path, first):
    path = jsonl(tmp_path / "rows.jsonl", first, RAW)
    check_inputs([path])
    assert [getattr(row, "type", row.id) for row in read(path)][1:] == ["p1"]


class _Server(http.server.BaseHTTPRequestHandler):
    """Answers /STATUS/... with that status."""

    def do_GET(self):
        status = int(self.path.split("/")[1])
        self.send_response(status)
        self.end_headers()
        if status == 200 and self.command == "GET":
            self.wfile.write(json.dumps(RAW).encode())

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def test_a_server_that_gives_no_file_is_told_from_a_file_that_is_not_there():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        check_inputs([f"{address}/200/rows.jsonl"])
        assert [row.id for row in read(f"{address}/200/rows.jsonl")] == ["p1"]
        for status, words in ((403, "403.*Forbidden"), (404, "does not exist"), (500, "500.*Internal Server Error")):
            with pytest.raises(InputUnusable, match=words) as unusable:
                check_inputs([f"{address}/{status}/rows.jsonl"])
            assert ("does not exist" in str(unusable.value)) == (status == 404)
        server.shutdown()
    with pytest.raises(
        InputUnusable, match=r"rows.jsonl cannot be reached: Cannot connect .* check the address"
    ) as gone:
        check_inputs([f"{address}/200/rows.jsonl"])
    assert "\n" not in str(gone.value)


def test_a_parquet_file_without_rows_and_an_unknown_protocol(tmp_path):
    pq.write_table(pa.table({"id": pa.array([], pa.string())}), tmp_path / "none.parquet")
    with pytest.raises(InputUnusable, match="is empty"):
        check_inputs([str(tmp_path / "none.parquet")])
    with pytest.raises(InputUnusable, match="Protocol not known"):
        check_inputs(["nowhere://rows.jsonl"])
