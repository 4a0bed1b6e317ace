"""Benchmarks as they are published, read as input rows: what the model is asked, the region, and what a checker needs.

A row's `metadata` carries the checker's part; its region is what the benchmark wants followed: rules or a source.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NQ_INSTRUCTION = "Answer the question from the document, in as few words as possible."


class SuiteUnusable(ValueError):
    """A benchmark file that is not what its suite publishes."""


def read_suite(name: str, path: str) -> list[dict[str, Any]]:
    """Rows (dicts as in an input file) of the benchmark `name` at `path`. Raises SuiteUnusable, in one line."""
    if name not in SUITES:
        raise SuiteUnusable(f"unknown suite {name!r}; known: {', '.join(SUITES)}")
    try:
        with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise SuiteUnusable(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    rows = []
    try:
        for number, record in enumerate(_records(text), start=1):
            rows.append(SUITES[name](record, number))
    except (KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
        where = f"record {len(rows) + 1}"
        raise SuiteUnusable(f"{Path(path).name}: {where} is no record of {name}: {_reason(error)}") from error
    if not rows:
        raise SuiteUnusable(f"{path}: holds no record of {name}")
    return rows


def _records(text: str) -> Iterator[dict[str, Any]]:
    if text.lstrip().startswith("["):
        yield from json.loads(text)
    else:
        yield from (json.loads(line) for line in text.splitlines() if line.strip())


def _iheval(record: dict[str, Any], number: int) -> dict[str, Any]:
    """IHEval, rule following (NAACL 2025): the rules stand in the system prompt."""
    answer = record["answer"]
    return {
        "id": f"{record['id']}",
        "messages": [
            {"role": "system", "content": record["system"]},
            {"role": "user", "content": record["instruction"]},
        ],
        "roi": [{"message": 0}],
        "metadata": {"instruction_id_list": answer["instruction_id_list"], "kwargs": answer["kwargs"]},
    }


def _nq(record: dict[str, Any], number: int) -> dict[str, Any]:
    """Natural Questions with the gold passage (lost-in-the-middle): the passage is the source to keep to."""
    passage, question = record["ctxs"][0]["text"], record["question"]
    before = f"{NQ_INSTRUCTION}\n\nDocument: "
    return {
        "id": f"nq-{number}",
        "messages": [{"role": "user", "content": f"{before}{passage}\n\nQuestion: {question}?"}],
        "roi": [{"message": 0, "chars": [len(before), len(before) + len(passage)]}],
        "metadata": {"question": question, "answers": record["answers"]},
    }


SUITES: dict[str, Callable[[dict[str, Any], int], dict[str, Any]]] = {"iheval": _iheval, "nq": _nq}


def _reason(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else f"{error}"
