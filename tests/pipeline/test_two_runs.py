"""Two `agd-vllm decode` on one `s3://` output, with a tiny model's engines: the second is refused, nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pyarrow as pa
import pytest
from chaos import heed_interrupts
from conftest import CHECKOUT
from real_runs import engine_options, write_rows

from agd_vllm.output.storage import OutputDirectory

ROWS, TOKENS = 40, 48


@pytest.fixture
def command(tiny_smollm2, s3, tmp_path):
    """What to start, as a scheduler does it again."""
    rows = [{"id": f"r{number}", "prompt": f"{number} is", "min_tokens": TOKENS} for number in range(ROWS)]
    data = write_rows(tmp_path / "rows.jsonl", [{"id": "bad"}, *rows])
    command = [sys.executable, "-m", "agd_vllm", "decode", str(data), "--output", s3.url, "--strategy", "greedy"]
    command += ["--model", str(tiny_smollm2), "--max-tokens", f"{TOKENS}", "--part-rows", "3"]
    return command + engine_options(max_model_len=256, max_num_seqs=2)


def run(command, s3):
    return subprocess.run(
        command, env=os.environ | s3.environment, cwd=CHECKOUT, capture_output=True, text=True, timeout=300
    )


def refused(command, s3):
    done = run(command, s3)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("agd-vllm: ")]
    return done.returncode == 1 and "another run is writing there" in line and "its lease expires in" in line


def wait_for(there, process):
    deadline = time.monotonic() + 240
    while not there():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.2)


def leases(s3):
    return [name for name in s3.names() if "lease" in name]


@pytest.mark.long
def test_a_second_run_is_refused_and_the_first_one_resumed_after_a_signal(command, s3):
    first = psutil.Popen(
        command,
        env=os.environ | s3.environment,
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )
    wait_for(lambda: leases(s3), first)
    assert refused(command, s3), "before the first part"
    wait_for(lambda: s3.names("results"), first)
    first.send_signal(signal.SIGSTOP)  # else it may be done before the other has begun
    assert refused(command, s3), "after it"
    first.send_signal(signal.SIGCONT)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 1, said
    assert not leases(s3) and not s3.names("errors")
    assert len(s3.read("errors.jsonl").splitlines()) == 1
    before = {name: s3.read(f"results/{name}") for name in s3.names("results")}
    assert 0 < len(before) < ROWS // 3

    done = run(command, s3)
    assert done.returncode == 3, done.stderr
    assert not leases(s3)
    names = s3.names("results")
    assert before.items() <= {name: s3.read(f"results/{name}") for name in names}.items()
    output = OutputDirectory(s3.url)
    table = pa.concat_tables([output.read_table(f"results/{name}", ["id", "token_ids"]) for name in names])
    assert sorted(table["id"].to_pylist()) == sorted(f"r{number}" for number in range(ROWS))
    summary = json.loads(s3.read("summary.json"))
    assert (summary["rows"], summary["decoded"], summary["failed"]) == (ROWS + 1, ROWS, 1)
    assert [json.loads(line)["id"] for line in s3.read("errors.jsonl").splitlines()] == ["bad"]
