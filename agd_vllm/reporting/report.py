"""A run, or two of them side by side, as one HTML file: what goes into the page, and where from."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from agd_vllm.output.run_reader import RunReader
from agd_vllm.output.storage import place_of_file
from agd_vllm.prompts.tokenizer import load_tokenizer
from agd_vllm.reporting.figures import figures
from agd_vllm.reporting.page import page
from agd_vllm.reporting.reported_run import Relevance, ReportedRun
from agd_vllm.reporting.rows import differences, encoded, natural_order, side
from agd_vllm.reporting.texts import TextTable, TokenTexts

REPORT = "report.html"
# Heat maps are most of a file: those of guided steps come first, and what does not fit is left out and counted.
RELEVANCE_BYTES = 48 << 20


@dataclass(frozen=True, slots=True)
class ReportSettings:
    """What to show: `max_rows` rows at most; `model` says where the tokenizer is, where that is not the run's."""

    run: str
    compare: str | None = None
    output: str | None = None
    max_rows: int = 500
    model: str | None = None
    trust_remote_code: bool = False


def write_report(settings: ReportSettings) -> tuple[str, int, int]:
    """Writes the page; returns its path, and how many rows it shows and leaves out.

    Raises ValueError, with one line, for an output that is a folder, a directory without a run or rows and a tokenizer
    that is not at hand, and OutputFailed where a file cannot be read or written.
    """
    path = settings.output or f"{settings.run.rstrip('/')}/{REPORT}"
    place, name = place_of_file(path)
    table = TextTable()
    readers = [RunReader(directory) for directory in (settings.run, settings.compare) if directory is not None]
    ids = sorted(readers[0].ids(), key=natural_order)
    if not ids:
        raise ValueError(f"run {settings.run}: no row is decoded there, so there is nothing to show")
    shown = ids[: settings.max_rows]
    runs = [_read(reader, shown, table, settings) for reader in readers]
    html = page(runs, table, [_row(id, runs) for id in shown], [_relevance(id, runs) for id in shown], len(ids))
    place.write(name, html.encode())
    return path, len(shown), len(ids) - len(shown)


def _read(reader: RunReader, ids: list[str], table: TextTable, settings: ReportSettings) -> ReportedRun:
    texts = TokenTexts(_tokenizer(reader, settings), table)
    name = os.path.basename(reader.directory)
    run = ReportedRun(reader, name, figures(reader), texts, {row.id: row for row in reader.rows(ids)})
    _take_relevance(run, ids)
    return run


def _tokenizer(reader: RunReader, settings: ReportSettings) -> Any:
    ran = reader.parameters()
    revision = ran.get("engine_args", {}).get("revision") if settings.model is None else None
    try:
        return load_tokenizer(settings.model or ran["model"], revision, settings.trust_remote_code)
    except ValueError as error:
        raise ValueError(
            f"run {reader.directory}: the tokenizer that its tokens are read with is not at hand: {error}; name a "
            "folder that has it with --model"
        ) from error


def _take_relevance(run: ReportedRun, ids: Collection[str]) -> None:
    """Heat maps of guided steps as far as there is room, then those of other steps."""
    room = RELEVANCE_BYTES
    for id, step, token_id, values in _guided_first(run, ids):
        if room >= len(values[1]):
            room -= len(values[1])
            run.relevance.setdefault(id, {}).setdefault(step, {})[token_id] = values
        else:
            run.left_out += 1


def _guided_first(run: ReportedRun, ids: Collection[str]) -> Iterator[tuple[str, int, int, list[Any]]]:
    guided = {(id, step.step) for id, row in run.rows.items() for step in row.steps}
    others = []
    for found in run.reader.relevance(ids):
        heat_map = found["id"], found["step"], found["token_id"], encoded(found["relevance"])
        if heat_map[:2] in guided:
            yield heat_map
        else:
            others.append(heat_map)
    yield from others


def _row(id: str, runs: list[ReportedRun]) -> dict[str, Any]:
    """A row of the page: a side for each run (null where it has no such row), and where they differ."""
    sides = []
    for run in runs:
        found = side(run.rows[id], run.texts) if id in run.rows else None
        if found is not None:
            found["relevant"] = sorted(run.relevance.get(id, {}))
        sides.append(found)
    row: dict[str, Any] = {"id": id, "sides": sides}
    if len(sides) == 2 and sides[1] is not None:
        row["differs"] = differences(sides[0]["answer"], sides[1]["answer"])
    return row


def _relevance(id: str, runs: list[ReportedRun]) -> list[Relevance] | None:
    found = [run.relevance.get(id, {}) for run in runs]
    return found if any(found) else None
