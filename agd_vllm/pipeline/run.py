"""A dataset from input files to an output directory: what `agd-vllm decode` and the Ray job do."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.console import Console

from agd_vllm.input.fingerprint import fingerprint
from agd_vllm.input.reader import check_inputs, read_rows
from agd_vllm.output.storage import OutputFailed
from agd_vllm.output.summary import count_outputs, open_run, write_summary
from agd_vllm.output.writer import RunWriter
from agd_vllm.pipeline.decoder import Decoder
from agd_vllm.pipeline.engines import Engines
from agd_vllm.pipeline.options import DecoderOptions
from agd_vllm.pipeline.progress import ProgressLine, print_summary, say
from agd_vllm.pipeline.run_date import recall_date, settle_date
from agd_vllm.pipeline.tally import Tally
from agd_vllm.prompts.answers import given_answer, gives_answer
from agd_vllm.prompts.dry_run import dry_run
from agd_vllm.prompts.prepare import Preparer
from agd_vllm.records import InputRow, RowError, RowRefused
from agd_vllm.strategies.agd import Agd
from agd_vllm.version import versions


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Where rows come from and results go; parts become durable after `part_rows` rows or `part_seconds` seconds.

    With `given_answers` a last message of role assistant is taken as the row's answer, which is not decoded then.
    `now`: what a chat template writes as today's date, where the run has none yet (None: the clock's).
    """

    inputs: tuple[str, ...]
    output: str
    limit: int | None = None
    resume: bool = True
    part_rows: int = 500
    part_seconds: float = 60.0
    given_answers: bool = False
    now: datetime | None = None


def run_dataset(settings: RunSettings, options: DecoderOptions, engines: Engines | None = None) -> int:
    """Decodes the dataset, resuming what is there, and prints table and output path; returns the failed rows' count.

    `engines` of an earlier run are used where they can be, and left to the next; without, they end with this one.
    Raises ValueError, InputUnusable or OutputUnusable before any model is loaded, later OutputFailed or RuntimeError.
    """
    check_inputs(settings.inputs)
    decoder = Decoder(options=options)
    identity = run_identity(settings, decoder)
    open_run(settings.output, identity, settings.resume)
    described = identity | options.strategy.described()
    notes = Console(stderr=True)
    progress = ProgressLine(notes)
    with RunWriter(settings.output, settings.part_rows, settings.part_seconds) as writer:
        # Not before the directory is this process's.
        described |= settle_date(decoder, settings.output, settings.now)
        tally = Tally(settings.output, decoder, progress)
        try:
            rows = _remaining(settings, writer)
            if settings.given_answers:
                rows = _without_answer(rows, decoder.preparer(), writer)
            first = next(rows, None)
            if first is None:
                say(notes, "nothing left to decode")
            else:
                say(notes, f"loading {decoder.model.path} ...")
                running = decoder if engines is None else engines.serving(decoder)
                _decode(decoder, running, itertools.chain([first], rows), writer, progress, tally, notes)
            writer.flush()
        except BaseException:
            # Interrupted or broken off: what is on disk is counted all the same. The first fault is the one to tell of.
            with suppress(OutputFailed):
                writer.flush()
                _write_summary(settings, decoder, described, tally)
            raise
        summary = _write_summary(settings, decoder, described, tally)
    print_summary(Console(), summary, settings.output)
    return summary["failed"]


def preview(inputs: tuple[str, ...], options: DecoderOptions, limit: int | None, output: str | None = None) -> int:
    """`--dry-run`: no model is loaded; returns the count of rows that would fail.

    Prompts have the date of the run in `output`, if one is there.
    """
    check_inputs(inputs)
    rows = itertools.islice(read_rows(inputs), limit)
    decoder = Decoder(options=options)
    if output is not None:
        recall_date(decoder, output)
    return dry_run(rows, decoder.preparer(), Console()).refused


def _remaining(settings: RunSettings, writer: RunWriter) -> Iterator[InputRow]:
    """Rows not completed by an earlier invocation. Refused ones go to the writer, which knows those it has."""
    completed = writer.completed_ids()
    for row in itertools.islice(read_rows(settings.inputs), settings.limit):
        if isinstance(row, RowError):
            writer.fail(row)
        elif row.id not in completed:
            yield row


def _without_answer(rows: Iterator[InputRow], preparer: Preparer, writer: RunWriter) -> Iterator[InputRow]:
    """Rows that are left to decode; those that give their answer go to the writer as they are."""
    for row in rows:
        if not gives_answer(row):
            yield row
            continue
        try:
            writer.add(given_answer(row, preparer))
        except RowRefused as refused:
            writer.fail(RowError.of(row, refused.type, str(refused)))


def _decode(
    decoder: Decoder,
    running: AbstractContextManager,
    rows: Iterable[InputRow],
    writer: RunWriter,
    progress: ProgressLine,
    tally: Tally,
    notes: Console,
) -> None:
    with running, progress:
        say(notes, decoder.layout)
        try:
            for outcome in decoder.outcomes(rows):
                if outcome is not None:
                    writer.fail(outcome) if isinstance(outcome, RowError) else writer.add(outcome)
                    progress.count(outcome)
                writer.flush_if_due()
                tally.keep_if_due()
                progress.show(decoder.waiting_for_attribution)
        finally:
            # Before engines and Ray are stopped, which takes longer than some schedulers wait.
            writer.flush()


def run_identity(settings: RunSettings, decoder: Decoder) -> dict[str, Any]:
    """What decides what is decoded and how: a run may only be continued by one with the same values."""
    options = decoder.options
    own = options.strategy.identity()
    if "roi_heads" in own:
        own["roi_heads"] = [list(head) for head in decoder.roi_heads]
    return {
        # Files may change under their names.
        "inputs": [fingerprint(source) for source in settings.inputs],
        "model": options.model,
        "model_digest": decoder.model.digest,
        "strategy": options.strategy.name,
        **own,
        "roi": options.default_roi,
        "max_tokens": options.max_tokens,
        "max_model_len": options.max_model_len,
        "dtype": options.dtype,
        "seed": options.seed,
        "engine_args": options.engine_args,
        "chat_template_kwargs": options.chat_template_kwargs,
        "trust_remote_code": options.trust_remote_code,
        "given_answers": settings.given_answers,
    }


def _write_summary(settings: RunSettings, decoder: Decoder, described: dict[str, Any], tally: Tally) -> dict[str, Any]:
    """Counts what is on disk, adds times and faults over all invocations, writes and returns it all."""
    tally.keep()
    options = decoder.options
    counts, total = count_outputs(settings.output), tally.total()
    summary = {
        **counts,
        **total,
        "tokens_per_second": counts["output_tokens"] / total["seconds"] if total["seconds"] else 0.0,
        **described,
        "engines": options.engines,
        **({"attribution_workers": options.workers} if isinstance(options.strategy, Agd) else {}),
        "versions": versions(),
    }
    write_summary(settings.output, summary)
    return summary
