"""The relevance of every token for the tokens of a run's answers: the job behind `agd-vllm attribute`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerFast

from agd_vllm.attribution.worker import AttributionSettings
from agd_vllm.engine.model_copies import overrides_for_copies
from agd_vllm.models.inspect import ModelInfo, inspect_model
from agd_vllm.output.identity import differences
from agd_vllm.output.relevance_writer import RELEVANCE, RELEVANCE_ERRORS, RelevanceWriter, TokenRelevance
from agd_vllm.output.run_reader import RunReader
from agd_vllm.output.summary import OutputUnusable, count_outputs
from agd_vllm.pipeline.explicable import check_explicable
from agd_vllm.pipeline.progress import say
from agd_vllm.pipeline.relevance_fleet import Attributed, RelevanceFleet, Task
from agd_vllm.records import DecodedRow
from agd_vllm.version import versions

# Beside `relevance/`: what it was computed with, and, at the end, how much of it there is.
DESCRIPTION = "relevance.json"
PROGRESS_SECONDS = 10.0
# Answers that are compared with their tokens, to notice a model with another vocabulary than the run's.
ROWS_COMPARED = 8


@dataclass(frozen=True, slots=True)
class RelevanceSettings:
    """What to attribute. What is None is the run's: `model`, `rule`, `dtype` (that of its attribution).

    `max_steps` bounds the steps of each row (None: all of them), `limit` the rows, in completion order.
    """

    run: str
    model: str | None = None
    rule: str | None = None
    dtype: str | None = None
    max_steps: int | None = None
    limit: int | None = None
    workers: int = 1
    trust_remote_code: bool = False
    debug: bool = False


def selected_steps(row: DecodedRow, max_steps: int | None) -> list[int]:
    """The steps to attribute, those first that a reader looks at first: guided steps that changed the token, then the
    other guided ones, then all the rest, each in the order of the answer."""
    guided = [step.step for step in sorted(row.steps, key=lambda step: not step.changed)]
    rest = set(range(len(row.token_ids))).difference(guided)
    return [*guided, *sorted(rest)][:max_steps]


def step_targets(row: DecodedRow, steps: list[int]) -> list[tuple[int, int]]:
    """(step, token id) to attribute: the answer's token, and beside it the greedy one where guidance changed it."""
    greedy = {step.step: step.greedy_id for step in row.steps if step.changed}
    targets = []
    for step in steps:
        targets.append((step, row.token_ids[step]))
        if step in greedy:
            targets.append((step, greedy[step]))
    return targets


def attribute_run(settings: RelevanceSettings) -> int:
    """Attributes the answers of a run, going on with what is there, and prints counts; returns the failed rows' count.

    Raises ValueError or OutputUnusable before any weights are loaded, later OutputFailed or RuntimeError.
    """
    run = RunReader(settings.run)
    _check_run(run)
    counts = count_outputs(settings.run)
    if not counts["decoded"]:
        raise ValueError(f"run {settings.run}: no row is decoded there, so there is nothing to attribute")
    model, identity = _resolve(run, settings)
    notes = Console(stderr=True)
    if not counts["guided_steps"]:
        say(notes, f"run {settings.run} has no guided step: the answers' tokens are attributed in their order")
    begun = time.monotonic()
    with RelevanceWriter(settings.run) as writer:
        _claim(run, identity)
        tasks = remaining(run, settings, writer)
        first = next(tasks, None)
        if first is None:
            say(notes, "nothing left to attribute")
        else:
            say(notes, f"loading {model.path} ...")
            attribution = AttributionSettings(
                "lxt", identity["rule"], identity["dtype"], overrides=identity.get("hf_overrides", {})
            )
            with RelevanceFleet(model, attribution, settings.workers, settings.debug) as fleet:
                say(notes, fleet.layout)
                rows = min(counts["decoded"], settings.limit or counts["decoded"])
                _work_off(fleet, itertools.chain([first], tasks), writer, notes, rows)
        writer.flush()
        summary = {
            "rows": writer.rows,
            "failed": writer.failed,
            "steps": writer.steps,
            "relevances": writer.relevances,
            **identity,
            "max_steps": settings.max_steps,
            "versions": versions(),
        }
        run.output.write_json(DESCRIPTION, summary)
    _print(Console(), summary, time.monotonic() - begun, run.directory)
    return summary["failed"]


def _check_run(run: RunReader) -> None:
    try:
        check_explicable(run.parameters())
    except ValueError as error:
        raise ValueError(f"run {run.directory}: {error}") from error


def _claim(run: RunReader, identity: dict[str, Any]) -> None:
    """Relevance of one model, rule and dtype only in a directory. Raises OutputUnusable for that of another."""
    held = run.json(DESCRIPTION)
    if not held:
        run.output.write_json(DESCRIPTION, identity)
    elif different := differences({name: held.get(name) for name in identity}, identity):
        place = f"{run.directory}/{RELEVANCE}"
        raise OutputUnusable(
            f"output {place} holds other relevance: {'; '.join(different)}; repeat its options, or begin anew by "
            f"removing it and {DESCRIPTION} beside it"
        )


def _resolve(run: RunReader, settings: RelevanceSettings) -> tuple[ModelInfo, dict[str, Any]]:
    """The model, checked against the run's answers, and what decides the relevance's values."""
    parameters = run.parameters()
    path = settings.model or parameters["model"]
    own = path == parameters["model"]
    engine_args = parameters.get("engine_args", {})
    revision = engine_args.get("revision") if own else None
    # Wherever the model lies now.
    overrides = overrides_for_copies(engine_args)
    try:
        model, tokenizer = inspect_model(
            path,
            attribution=True,
            revision=revision,
            trust_remote_code=settings.trust_remote_code,
            overrides=overrides,
        )
    except ValueError as error:
        hint = "" if settings.model else f" (as {settings.run} names it; --model says where it is now)"
        raise ValueError(f"{error}{hint}") from error
    _check_vocabulary(run, settings.run, model, tokenizer)
    identity = {
        "model": path,
        "revision": revision,
        "rule": settings.rule or parameters.get("rule", "attnlrp"),
        "dtype": settings.dtype or parameters.get("attribution_dtype") or parameters.get("dtype", "auto"),
        **({"hf_overrides": overrides} if overrides else {}),
    }
    return model, identity


def _check_vocabulary(run: RunReader, name: str, model: ModelInfo, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises ValueError where the first answers' tokens are not the model's: they read otherwise than their text."""
    rows = list(itertools.islice(run.rows(), ROWS_COMPARED))
    known = all(max(row.prompt_token_ids + row.token_ids) < model.vocab_size for row in rows)
    if not known or not any(_reads_as(tokenizer, row) for row in rows):
        raise ValueError(
            f"--model {model.path}: the tokens of the answers in {name} mean something else to it; give the model of "
            f"the run, {run.parameters()['model']}, or one with the same tokenizer"
        )


def _reads_as(tokenizer: PreTrainedTokenizerFast, row: DecodedRow) -> bool:
    read = tokenizer.decode(row.token_ids, skip_special_tokens=True)
    return read.strip().startswith(row.text.strip())


def remaining(run: RunReader, settings: RelevanceSettings, writer: RelevanceWriter) -> Iterator[Task]:
    """Rows with steps that no earlier invocation has attributed; more of a row's where it asked for fewer."""
    for row in itertools.islice(run.rows(), settings.limit):
        if writer.has_failed(row.id):
            continue
        steps = selected_steps(row, settings.max_steps)[writer.steps_of(row.id) :]
        if steps:
            yield Task(row.id, row.prompt_token_ids, row.token_ids, step_targets(row, steps))


def _work_off(fleet: RelevanceFleet, tasks: Iterator[Task], writer: RelevanceWriter, notes: Console, rows: int) -> None:
    begun = shown = time.monotonic()
    before = writer.steps
    for done in fleet.attribute(tasks):
        if done is not None:
            _keep(done, writer)
        writer.flush_if_due()
        now = time.monotonic()
        if now - shown >= PROGRESS_SECONDS:
            shown = now
            speed = (writer.steps - before) / (now - begun)
            line = f"{writer.rows} of {rows} rows ({writer.failed} failed), {writer.steps} steps, {speed:.1f} steps/s"
            say(notes, line)


def _keep(done: Attributed, writer: RelevanceWriter) -> None:
    if done.fault is not None:
        writer.fail(done.task.id, *done.fault)
        return
    targets = zip(done.task.targets, done.relevances, strict=True)
    writer.add(
        done.task.id, [TokenRelevance(step, token, found.logit, found.tokens) for (step, token), found in targets]
    )


def _print(console: Console, summary: dict[str, Any], seconds: float, directory: str) -> None:
    say(
        console,
        f"{summary['rows']} rows, {summary['steps']} steps, {summary['relevances']} tokens attributed "
        f"({summary['failed']} rows failed), {seconds:.1f} s",
    )
    say(console, f"relevance: {directory}/{RELEVANCE}")
    if summary["failed"]:
        say(console, f"failed rows, with reasons: {directory}/{RELEVANCE_ERRORS}")
