"""`ray job submit` of jobs/decode.py to a cluster on this machine, as a user of a cluster runs it."""

import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import CHECKOUT

BIN = Path(sys.executable).parent
PORT, DASHBOARD = 26379, 28265


def ray(environment: dict[str, str], *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess:
    command = [str(BIN / "ray"), *arguments]
    return subprocess.run(command, env=environment, cwd=CHECKOUT, capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def cluster(tmp_path):
    """A head node with token authentication, as `ray start` sets it up by default; its users' environment."""
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    start = ("start", "--head", f"--port={PORT}", f"--dashboard-port={DASHBOARD}", "--num-cpus=4", "--block")
    log = tmp_path / "head.log"
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


def test_a_submitted_job_decodes_the_demo_rows(cluster, smollm2, tmp_path):
    output = tmp_path / "out"
    job = ["python", "jobs/decode.py", "examples/demo.jsonl", "--output", str(output), "--model", str(smollm2)]
    job += ["--max-model-len", "1024", "--engine-arg", "enforce_eager=true"]
    submit = ("job", "submit", f"--address=http://127.0.0.1:{DASHBOARD}", "--working-dir", ".", "--")
    done = ray(cluster, *submit, *job, timeout=500)
    deadline = time.monotonic() + 60
    while "No available agent" in done.stderr and time.monotonic() < deadline:  # the head is up, its agent not yet
        time.sleep(2)
        done = ray(cluster, *submit, *job, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    assert pq.read_table(output / "results").num_rows == 26
    assert pq.read_table(output / "steps").num_rows > 0
