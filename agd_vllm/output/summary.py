"""What a run is and what came of it: `run.json`, `summary.json`, and the counts over a whole output directory."""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from agd_vllm.output.claim import claimed, is_of_a_claim
from agd_vllm.output.error_log import count_errors
from agd_vllm.output.identity import run_differences
from agd_vllm.output.parts import Firsts, parts, steps_of
from agd_vllm.output.storage import OutputDirectory, OutputFailed
from agd_vllm.output.writer import ERRORS

RUN = "run.json"
SUMMARY = "summary.json"


class OutputUnusable(Exception):
    """An output directory that this run must not write into, or cannot. One line: which, why, how to fix it."""


def open_run(directory: str, identity: dict[str, Any], resume: bool) -> None:
    """Claims a directory for the run that `identity` describes: a new or empty one, or with `resume` the same run's.

    `identity` is JSON whose values decide what is decoded and how (model, strategy, parameters, inputs). It is kept in
    `run.json`; whether a later run is the same one: `run_differences`. Nothing in the directory is
    changed but for `run.json`, which appears before anything else of the run.
    Raises:
        OutputUnusable: for a directory of another run (naming what differs) or of no run, one that is not empty without
            `resume`, a file, and one that cannot be written.
    """
    try:
        output = OutputDirectory(directory)
        if output.is_file():
            raise OutputUnusable(f"output {directory} is a file; give a directory")
        identity = _finite(identity)
        names = _names(output)
        if not names:
            # Of two runs that begin in a new directory at once, the second must not replace what the first one is.
            with claimed(output):
                names = _names(output)
                if not names:
                    output.write_json(RUN, identity)
                    return
        if RUN not in names:
            raise OutputUnusable(f"output {directory} is not empty and holds no run; give another directory")
        if not resume:
            raise OutputUnusable(f"output {directory} holds a run already; give another directory, or resume it")
        held = output.read_json(RUN)
    except OutputFailed as failed:
        raise OutputUnusable(str(failed)) from failed
    different = run_differences(held, identity)
    if different:
        raise OutputUnusable(
            f"output {directory} holds a different run: {'; '.join(different)}; repeat its options, or give another "
            "directory"
        )


def _names(output: OutputDirectory) -> set[str]:
    """What a directory holds. What a start leaves behind if it dies is no one's data."""
    return {name for name in output.names() if not is_of_a_claim(name)}


def write_summary(directory: str, summary: dict[str, Any]) -> None:
    """Replaces `summary.json` at once. Numbers that JSON has not (infinite, NaN) become null.

    Raises:
        OutputFailed: where it cannot be written; an earlier summary is then still in place.
    """
    OutputDirectory(directory).write_json(SUMMARY, _finite(summary))


def count_outputs(directory: str) -> dict[str, int]:
    """`rows`, `decoded`, `failed`, `prompt_tokens`, `output_tokens`, `guided_steps` and `changed_tokens` (steps whose
    choice is not the greedy token), counted from what is on disk, part by part, after any number of resumes.

    Raises:
        OutputFailed: where a part cannot be read.
    """
    output = OutputDirectory(directory)
    counts = dict.fromkeys(
        ("rows", "decoded", "failed", "prompt_tokens", "output_tokens", "guided_steps", "changed_tokens"), 0
    )
    firsts, with_steps = Firsts(), {*parts(output, "steps")}
    for part in parts(output, "results"):
        whole = output.read_table(f"results/{part}", ["id", "prompt_token_ids", "token_ids"])
        table = firsts.of(whole)
        counts["decoded"] += table.num_rows
        counts["prompt_tokens"] += _total(pc.list_value_length(table["prompt_token_ids"]))
        counts["output_tokens"] += _total(pc.list_value_length(table["token_ids"]))
        if part in with_steps:
            steps = steps_of(output, part, ["chosen_id", "greedy_id"], None if table is whole else table)
            counts["guided_steps"] += steps.num_rows
            counts["changed_tokens"] += _total(pc.not_equal(steps["chosen_id"], steps["greedy_id"]))
    counts["failed"] = count_errors(output, ERRORS, firsts.ids.__contains__)
    counts["rows"] = counts["decoded"] + counts["failed"]
    return counts


def _total(values: pa.ChunkedArray) -> int:
    return pc.sum(values).as_py() or 0


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
