"""Real runs in float32 that several files look at, so that engines start once for all: `agd-vllm decode` over rows of
every kind, bad ones among them, and one that guides every step. And a cluster with its jobs."""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from chaos import demo_rows
from conftest import CHECKOUT, ENGINE_ARGS

# Short, because the paper's loop (test_agd_equals_paper.py) starts from the prompt again at every step.
PROMPTS = (
    ("Answer only in French.", "Name a fruit and say why you like it."),
    ("Use no commas at all.", "List the things one needs for a picnic."),
    ("You are a grumpy pirate.", "How do I boil an egg?"),
    ("Reply in one short sentence.", "Why is the sky blue?"),
    ("Never use the word water.", "What do plants need to grow?"),
    ("End with the words: that is all.", "Tell me about the moon."),
)
TOKENS = 24
# What the gate's threshold is unless it is given.
DEFAULT_TAU = 1.734
GOOD = {"id": "good", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]}
BAD = {
    "malformed": '{"id": "x", ',
    "not an object": "[1, 2]",
    "no id": json.dumps({"prompt": "Hi"}),
    "duplicate id": json.dumps(GOOD),
    "both": json.dumps({**GOOD, "id": "both", "prompt": "Hi"}),
    "neither": json.dumps({"id": "neither"}),
    "unknown role": json.dumps({"id": "role", "messages": [{"role": "wizard", "content": "Hi"}]}),
    "no messages": json.dumps({"id": "empty", "messages": []}),
    "no match": json.dumps({**GOOD, "id": "match", "roi": [{"message": 0, "text": "French"}]}),
    "out of range": json.dumps({**GOOD, "id": "range", "roi": [{"message": 7}]}),
    "unknown key": json.dumps({**GOOD, "id": "key", "roi": [{"massage": 0}]}),
    "no region": json.dumps({"id": "region", "messages": [{"role": "user", "content": "Hi"}]}),
    "temperature": json.dumps({**GOOD, "id": "temperature", "temperature": 0.7}),
    "n": json.dumps({**GOOD, "id": "n", "n": 2}),
    "penalty": json.dumps({**GOOD, "id": "penalty", "frequency_penalty": 0.5}),
    "tools": json.dumps({**GOOD, "id": "tools", "tools": [{"type": "function"}]}),
    "list content": json.dumps({"id": "list", "messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    "longer than the model": json.dumps({"id": "long", "prompt": "word " * 900, "roi": [{"chars": [0, 4]}]}),
}


def short_rows() -> list[dict]:
    """The rows that are compared with the paper's loop."""
    both = [[{"role": "system", "content": s}, {"role": "user", "content": u}] for s, u in PROMPTS]
    return [{"id": f"short-{i}", "messages": messages, "max_tokens": TOKENS} for i, messages in enumerate(both)]


def engine_options(**args: object) -> list[str]:
    """ENGINE_ARGS and more as options of the command line."""
    args = ENGINE_ARGS | args
    options = ["--max-model-len", f"{args.pop('max_model_len')}"]
    return options + [part for key, value in args.items() for part in ("--engine-arg", f"{key}={json.dumps(value)}")]


def write_rows(path: Path, rows: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass(frozen=True)
class Run:
    """What was run, on which rows, into which folder, and what it said. Arguments are those of `agd-vllm`."""

    arguments: list[str]
    data: Path
    output: Path
    done: subprocess.CompletedProcess


def run(arguments: list[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "agd_vllm", *arguments]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="session")
def command_run(smollm2, tmp_path_factory) -> Run:
    """A good row, every kind of bad one, then short-* and 16 of the demo by their numbers, as in test_chaos.py. In a
    cache of 19 blocks of 32 tokens, traced (trace.json beside the folder)."""
    folder = tmp_path_factory.mktemp("command")
    data, output = folder / "rows.jsonl", folder / "out"
    bad = [b"", *(text.encode() for text in BAD.values()), b'{"id": "utf8", "prompt": "\xff"}']
    good = [json.dumps(row).encode() for row in (*short_rows(), *demo_rows(16))]
    data.write_bytes(b"\n".join([json.dumps(GOOD).encode(), *bad, *good]) + b"\n")
    arguments = ["decode", str(data), "--model", str(smollm2), "--output", str(output), "--dtype", "float32"]
    arguments += ["--max-tokens", f"{TOKENS}", "--max-model-len", "608", "--trace", str(folder / "trace.json")]
    for arg in ("enforce_eager=true", "block_size=32", "num_gpu_blocks_override=20", "max_num_seqs=8"):
        arguments += ["--engine-arg", arg]
    return Run(arguments, data, output, run(arguments))


BIN = Path(sys.executable).parent
PORT, DASHBOARD = 26379, 28265


def ray(environment: dict[str, str], *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess:
    command = [str(BIN / "ray"), *arguments]
    return subprocess.run(command, env=environment, cwd=CHECKOUT, capture_output=True, text=True, timeout=timeout)


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """A head node with token authentication, as `ray start` sets it up by default; its users' environment."""
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    start = ("start", "--head", f"--port={PORT}", f"--dashboard-port={DASHBOARD}", "--num-cpus=4", "--block")
    log = folder / "head.log"
    with log.open("w") as file:
        command = [str(BIN / "ray"), *start, "--disable-usage-stats"]
        head = subprocess.Popen(command, env=environment, cwd=CHECKOUT, stdout=file, stderr=file)
    deadline = time.monotonic() + 120
    while "Ray runtime started" not in log.read_text():
        assert head.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)
    yield environment
    # It ends what it has started; `ray stop` would end every cluster on the machine.
    head.terminate()
    head.wait(60)


def submit(environment: dict[str, str], job: list[str]) -> subprocess.CompletedProcess:
    """`ray job submit` of a command in the checkout, as a user of a cluster runs it."""
    arguments = ("job", "submit", f"--address=http://127.0.0.1:{DASHBOARD}", "--working-dir", ".", "--", *job)
    done = ray(environment, *arguments, timeout=500)
    deadline = time.monotonic() + 180
    while "No available agent" in done.stderr and time.monotonic() < deadline:  # the head is up, its agent not yet
        time.sleep(2)
        done = ray(environment, *arguments, timeout=500)
    return done


@pytest.fixture(scope="session")
def guided_run(smollm2, tmp_path_factory) -> Run:
    """short-* with a gate that is always open."""
    folder = tmp_path_factory.mktemp("guided")
    data, output = write_rows(folder / "rows.jsonl", short_rows()), folder / "out"
    arguments = ["decode", str(data), "--output", str(output), "--model", str(smollm2), "--dtype", "float32"]
    arguments += ["--tau", "0", *engine_options()]
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    return Run(arguments, data, output, done)
