"""An evaluation: a suite's rows under several strategies, a run directory each, and one table over them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from agd_vllm.evaluation.outcomes import read_outcomes
from agd_vllm.evaluation.passes import forward_passes
from agd_vllm.evaluation.perplexity import perplexities
from agd_vllm.evaluation.scoring import Scores, check_metadata, score
from agd_vllm.evaluation.strategies import EvaluatedStrategy, reference
from agd_vllm.evaluation.suites import Row, read_suite
from agd_vllm.evaluation.table import markdown, record
from agd_vllm.input.schema import row_id
from agd_vllm.output.run_reader import RunReader
from agd_vllm.output.storage import OutputDirectory
from agd_vllm.output.summary import OutputUnusable, open_run
from agd_vllm.pipeline.decoder import Decoder, DecoderOptions
from agd_vllm.pipeline.engines import Engines
from agd_vllm.pipeline.run import RunSettings, run_dataset, run_identity
from agd_vllm.pipeline.run_date import settle_date
from agd_vllm.strategies.agd import Agd

ROWS, ROWS_WITHOUT_REGION = "rows.jsonl", "rows-without-region.jsonl"
TABLE_JSON, TABLE_MARKDOWN = "table.json", "table.md"


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """What is evaluated and where it goes; `distractors` are for nq, drawn with the seed of the decoder's options.

    `now` as for RunSettings.
    """

    suite: str
    data: str | None
    output: str
    limit: int | None = None
    distractors: int = 0
    now: datetime | None = None


def evaluate(
    settings: EvaluationSettings,
    options: DecoderOptions,
    strategies: Sequence[EvaluatedStrategy],
    say: Callable[[str], None],
) -> int:
    """Decodes what is missing, writes and says the table; returns how many rows failed, over all strategies.

    `options`: the model, the seed and what else the strategies share. Whatever makes a strategy unusable is found
    before the first one loads a model. The same call resumes it. Raises ValueError, OutputUnusable or, later, what
    `run_dataset` raises.
    """
    rows = read_suite(settings.suite, settings.data, distractors=settings.distractors, seed=options.seed)
    chosen = rows[: settings.limit]
    check_metadata((row_id(row), _metadata(row)) for row in chosen)
    runs = [_run_settings(settings, strategy) for strategy in strategies]
    decoders = [Decoder(options=strategy.options) for strategy in strategies]
    _write_rows(settings.output, rows, any(strategy.names_region for strategy in strategies))
    for run, decoder in zip(runs, decoders, strict=True):
        open_run(run.output, run_identity(run, decoder), resume=True)
    runs = _dated(runs, decoders, settings)
    failed = {}
    # Those that can share engines one after another, in the order in which the first of them was named.
    order = sorted(range(len(runs)), key=lambda i: next((j for j in range(i) if decoders[i].loads_as(decoders[j])), i))
    with Engines() as engines:
        for place in order:
            say(f"── {strategies[place].name}")
            failed[strategies[place].name] = run_dataset(runs[place], strategies[place].options, engines)
    ids = {id for id in map(row_id, chosen) if id is not None}
    outcomes = {strategy.name: read_outcomes(run.output, ids) for strategy, run in zip(strategies, runs, strict=True)}
    summaries = [RunReader(run.output).parameters() for run in runs]
    scores = score(outcomes)
    say("── perplexity of the answers")
    quality, measured = perplexities(options, outcomes)
    records = [
        record(
            strategy.name,
            scores.rows,
            reference(strategies),
            outcomes[strategy.name],
            {
                "relevance": isinstance(strategy.options.strategy, Agd),
                "failed": failed[strategy.name],
                "perplexity": quality[strategy.name],
                "tokens_per_second": summary["tokens_per_second"],
                "forward_passes": forward_passes(strategy.options.strategy, outcomes[strategy.name]),
            },
        )
        for strategy, summary in zip(strategies, summaries, strict=True)
    ]
    output = OutputDirectory(settings.output)
    output.write_json(TABLE_JSON, records)
    table = markdown(f"{settings.suite}, {options.model}", records, notes(settings, scores, measured, records[0]))
    output.write(TABLE_MARKDOWN, table.encode())
    say(table)
    say(f"table: {settings.output.rstrip('/')}/{TABLE_MARKDOWN}")
    return sum(failed.values())


def _metadata(row: Row) -> Mapping[str, Any]:
    return row.get("body", row)["metadata"]


def _run_settings(settings: EvaluationSettings, strategy: EvaluatedStrategy) -> RunSettings:
    folder = settings.output.rstrip("/")
    rows = ROWS_WITHOUT_REGION if strategy.names_region else ROWS
    return RunSettings((f"{folder}/{rows}",), f"{folder}/{strategy.folder}", settings.limit)


def _dated(runs: list[RunSettings], decoders: list[Decoder], settings: EvaluationSettings) -> list[RunSettings]:
    """The runs with one date for all of them, of today's invocation and of later ones."""
    for decoder in decoders:
        settle_date(decoder, settings.output, settings.now)
    return [replace(run, now=decoder.date) for run, decoder in zip(runs, decoders, strict=True)]


def _write_rows(directory: str, rows: Sequence[Row], without_region: bool) -> None:
    """The suite as input files. Every row of it, so that a larger limit goes on with the same input.

    Raises OutputUnusable for a directory that holds something else.
    """
    output = OutputDirectory(directory)
    names, lines = output.names(), _lines(rows)
    if names and ROWS not in names:
        raise OutputUnusable(f"output {directory} is not empty and holds no evaluation; give another directory")
    if names:
        with output.open(ROWS) as file, output.faults(ROWS):
            held = file.read()
        if held != lines:
            raise OutputUnusable(f"output {directory} holds an evaluation of other rows; give another directory")
    output.write(ROWS, lines)
    if without_region:
        output.write(ROWS_WITHOUT_REGION, _lines([_without_region(row) for row in rows]))


def _without_region(row: Row) -> Row:
    if "body" in row:
        return {**row, "body": _without_region(row["body"])}
    return {key: value for key, value in row.items() if key != "roi"}


def _lines(rows: Sequence[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def notes(settings: EvaluationSettings, scores: Scores, measured: str, first: Mapping[str, Any]) -> list[str]:
    """What must be known to read the table, and what was `measured` beside the scores; `first` is any of its records,
    as all have the same rows."""
    said = [
        "prompt accuracy: all rules of a row kept (strict); instruction accuracy: rules kept, of all rules",
        "differences in percentage points with a 95 % percentile interval of a paired bootstrap over rows, 10,000 "
        "resamples",
        f"{measured}; repetition: share of 4-grams that occurred before in the same answer; composite: prompt accuracy "
        "x (1 - repetition)",
        "passes/token: how often an output token goes through the layers, values and tangents each counting once, "
        "prompts apart",
    ]
    if settings.suite in ("nq", "jsonl"):
        said.append("questions: an answer contained in the text counts; exact match is beside it; both normalised")
    if settings.distractors:
        said.append(f"{settings.distractors} passages of other rows stand among each row's own")
    if scores.left_out:
        missing = "; ".join(f"{rule} needs {data}" for rule, data in sorted(scores.left_out.items()))
        bare = first["rows"] - first["scored_rows"]
        left = f"; {bare} of the {first['rows']} rows have no other rule and are not scored" if bare else ""
        said.append(f"left out, because its data is not installed: {missing}{left}")
    if scores.tripped:
        failed = ", ".join(f"{rule} ({count})" for rule, count in sorted(scores.tripped.items()))
        said.append(f"answers that a checker failed on, counted as not kept: {failed}")
    return said
