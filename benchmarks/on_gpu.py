"""All that a GPU must show, by one command: tests of what runs only there, then the figures, a stage after the other.

    python -m benchmarks.on_gpu --model M --input X --shape llama-3.1-8b --out DIR
    python -m benchmarks.on_gpu --model M --input X --shape llama-3.1-8b --out DIR2 --done DIR

Each stage writes DIR/STAGE.json when it ends, whether well or not, and the next one goes on. What has not ended by its
stage's limit is killed, with all that it has started. A stage whose limit is more than what is left of `--budget` is
not begun; with `--done` a later command continues from there. With `--shape` the weights are random ones of that shape,
written once, before the first stage that reads them, and of the model's folder only the tokenizer is read. The input is
JSON lines, 192 rows or more. Without a GPU the sizes are small, to try the command, and the tests are skipped.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import psutil
import torch

from benchmarks import random_model
from benchmarks.machine import gpu_names

CHECKOUT = Path(__file__).resolve().parent.parent
# Of a stage's output, what its JSON has where it failed.
LAST_LINES = 40
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Stage:
    """`commands` run side by side, for `seconds` at most. Words in braces stand for what is known when they begin;
    `result`: the JSON that they write, in their scratch folder."""

    name: str
    seconds: float
    commands: tuple[str, ...]
    result: str | None = None

    @property
    def reads_model(self) -> bool:
        return any("{model}" in command for command in self.commands)

    def filled(self, **words: str) -> list[list[str]]:
        return [[word.format(**words) for word in shlex.split(command)] for command in self.commands]

    def shown(self, model: str, input_path: str) -> list[str]:
        """Its commands, whatever machine they run on."""
        words = {"python": "python", "scratch": "SCRATCH", "model": model, "input": input_path}
        return [shlex.join(command) for command in self.filled(**words)]


SMOKE = "import sys, ray, vllm; from benchmarks.machine import write_result; write_result(sys.argv[1], {{}})"
PYTEST = "{python} -m pytest --noconftest -q -p no:cacheprovider"
BENCHMARK = "{python} -m benchmarks."
# Of the pool: rows, and new tokens of each.
POOL = {"cuda": (256, 128), "cpu": (4, 8)}
SIZES = {
    "cuda": {
        "pool": "--max-model-len 4096",
        # Two turns: with three they might not end in time.
        "inline": "--rows 8 --new 128 --prompt 0 --rows 64 --new 300 --prompt 0 --rows 256 --new 128 --prompt 0 "
        "--rows 64 --new 128 --prompt 1000 --continuous 256,64 --runs 2",
        "workers": "",
        "throughput": "--limit 64 --runs 1",
    },
    "cpu": {
        "pool": "--max-model-len 1024 --engine-arg enforce_eager=true --engine-arg kv_cache_memory_bytes=268435456",
        # More rows than the demo has.
        "inline": "--rows 30 --new 8 --prompt 0 --continuous 12,5 --pool --runs 1 --rest 0 --eager",
        "workers": "--steps 1,2 --tokens 1 --contexts 40",
        "throughput": "--limit 2 --runs 1 --max-tokens 8 --eager",
    },
}


def stages_of(device: str) -> list[Stage]:
    """In the order of a GPU machine whose commands end after 600 s: the first three are one, `inline` is the next."""
    sizes = SIZES[device]
    return [
        Stage("smoke", 60, (f"{{python}} -c {shlex.quote(SMOKE)} {{scratch}}/smoke.json",), "smoke.json"),
        Stage(
            "kernel-tests",
            180,
            (
                f"{PYTEST} tests/test_on_gpu.py -k attention_equals",
                f"{PYTEST} tests/test_on_gpu.py -k captured",
                f"{PYTEST} tests/test_on_gpu.py -k 'not attention_equals and not captured'",
                f"{PYTEST} tests/test_inline_on_gpu.py",
            ),
        ),
        Stage(
            "pool",
            160,
            (
                "{python} -m agd_vllm decode {scratch}/rows.jsonl --model {model} --output {scratch}/pool --tau 2.5 "
                + sizes["pool"],
            ),
            "pool/summary.json",
        ),
        Stage(
            "inline",
            400,
            (BENCHMARK + "inline --model {model} --input {input} --json {scratch}/inline.json " + sizes["inline"],),
            "inline.json",
        ),
        Stage(
            "workers",
            200,
            (BENCHMARK + "workers --model {model} --json {scratch}/workers.json " + sizes["workers"],),
            "workers.json",
        ),
        Stage(
            "throughput",
            300,
            (
                BENCHMARK + "throughput --model {model} --input {input} --json {scratch}/throughput.json "
                "--paper-seconds 0 " + sizes["throughput"],
            ),
            "throughput.json",
        ),
    ]


def run(stage: Stage, out: Path, environment: dict[str, str], described: dict[str, Any], **words: str) -> bool:
    """Runs a stage and writes its JSON. Whether it went well."""
    commands, begun = stage.filled(**words), time.monotonic()
    scratch = Path(words["scratch"])
    logs = [scratch / f"{stage.name}-{place}.log" for place in range(len(commands))]
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(_started(command, log, environment))
            for command, log in zip(commands, logs, strict=True)
        ]
        while (running := any(each.poll() is None for each in started)) and time.monotonic() - begun < stage.seconds:
            time.sleep(POLL_S)
    exits = [None if running and each.returncode == -signal.SIGKILL else each.returncode for each in started]
    outputs = [log.read_text(errors="replace").splitlines()[-LAST_LINES:] for log in logs]
    ok = not any(code != 0 for code in exits)
    # What was there when it failed, too.
    result = _read(scratch / stage.result) if stage.result else [lines[-1:] for lines in outputs]
    if stage.reads_model and isinstance(result, dict):
        # The folder of random weights has gone by the time that this is read.
        result |= {"model": described["model"]}
    found = {
        "stage": stage.name,
        "ok": ok,
        "timed_out": running,
        "seconds": round(time.monotonic() - begun, 1),
        "limit": stage.seconds,
        "commands": stage.shown(described["model"], Path(words["input"]).name),
        # None: ended by its limit.
        "exits": exits,
        **described,
        "result": result,
        "output": None if ok else outputs,
    }
    (out / f"{stage.name}.json").write_text(json.dumps(found, indent=2) + "\n")
    return ok


@contextlib.contextmanager
def _started(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen]:
    """A command in a group of its own, whose processes have ended afterwards."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=CHECKOUT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        # Some of those below it, Ray's, have groups of their own.
        below = []
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for each in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()


def _read(path: Path) -> Any:
    """None where it is not there, or not whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def run_all(
    stages: list[Stage],
    out: Path,
    done: Path | None,
    budget: float,
    model: Callable[[], str],
    environment: dict[str, str],
    described: dict[str, Any],
    **words: str,
) -> bool:
    """The stages that were not done before and fit into what is left of `budget` seconds. Whether all that ran went
    well. `model` gives its folder; it may take a while the first time."""
    begun, well = time.monotonic(), True

    def left() -> float:
        return budget - (time.monotonic() - begun)

    for stage in stages:
        if done is not None and (done / f"{stage.name}.json").exists():
            click.echo(f"{stage.name}: done before")
            continue
        if stage.reads_model and stage.seconds <= left():
            words["model"] = model()
        if stage.seconds > left():
            click.echo(f"{stage.name}: not begun, its limit is {stage.seconds:g} s and {left():.0f} s are left")
            continue
        click.echo(f"{stage.name}: begun, {left():.0f} s are left")
        ok = run(stage, out, environment, described, **words)
        click.echo(f"{stage.name}: {'done' if ok else 'FAILED'}, {out / stage.name}.json")
        well &= ok
    return well


def environment_of_children() -> dict[str, str]:
    environment = dict(os.environ)
    # Ray's actors look for the package there.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH"))))
    if importlib.util.find_spec("flashinfer") is None:
        # vLLM's sampler would not start without it.
        environment["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    return environment


def write_rows(source: Path, target: Path, count: int, new: int) -> None:
    """So many rows of `new` tokens; a short file is gone through again."""
    rows = [json.loads(line) for line in source.read_text().splitlines() if line.strip()]
    chosen = itertools.islice(itertools.cycle(rows), count)
    lines = [json.dumps(row | {"id": f"row-{place}", "max_tokens": new}) for place, row in enumerate(chosen)]
    target.write_text("\n".join(lines) + "\n")


@click.command(help=__doc__)
@click.option("--model", required=True, type=click.Path(exists=True, file_okay=False, resolve_path=True))
@click.option("--input", "input_path", required=True, type=click.Path(exists=True, dir_okay=False, resolve_path=True))
@click.option("--shape", type=click.Choice(list(random_model.SHAPES)), help="Random weights in place of the model's.")
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False))
@click.option("--budget", type=float, default=540, show_default=True, help="Seconds for all stages of this command.")
@click.option("--done", type=click.Path(path_type=Path), help="Stages whose JSON lies here are not run again.")
@click.option("--list", "only_list", is_flag=True, help="Show the stages, their limits and commands.")
def main(model, input_path, shape, out, budget, done, only_list):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stages = stages_of(device)
    if only_list:
        for stage in stages:
            click.echo(f"{stage.name}, {stage.seconds:g} s")
            for command in stage.shown(shape or model, input_path):
                click.echo(f"    {command}")
        return
    out.mkdir(parents=True, exist_ok=True)
    name, today = ", ".join(gpu_names()) or "CPU", datetime.date.today().isoformat()
    described = {"device": name, "model": shape or Path(model).name, "date": today}
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        words = {"python": sys.executable, "input": input_path, "scratch": scratch}
        write_rows(Path(input_path), Path(scratch) / "rows.jsonl", *POOL[device])
        folders: list[str] = []

        def written() -> str:
            folders.extend(() if folders else [stack.enter_context(random_model.of_shape(model, shape))])
            return folders[0]

        well = run_all(stages, out, done, budget, written, environment_of_children(), described, **words)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
