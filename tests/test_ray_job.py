"""`ray job submit` of jobs/decode.py to a cluster on this machine, as a user of a cluster runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import CHECKOUT

BIN = Path(sys.executable).parent
PORT, DASHBOARD = 26379, 28265


def ray(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_ADDRESS": f"http://127.0.0.1:{DASHBOARD}"}
    command = [str(BIN / "ray"), *arguments]
    return subprocess.run(command, env=environment, cwd=CHECKOUT, capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def cluster(tmp_path_factory):
    # Ray's sockets need a short path: pytest's own is too long.
    started = subprocess.run(
        [str(BIN / "ray"), "start", "--head", f"--port={PORT}", f"--dashboard-port={DASHBOARD}", "--num-cpus=4"],
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert started.returncode == 0, started.stdout + started.stderr
    yield
    ray("stop", "--force")


def test_a_submitted_job_decodes_the_demo_rows(cluster, smollm2, tmp_path):
    output = tmp_path / "out"
    job = ["python", "jobs/decode.py", "examples/demo.jsonl", "--output", str(output), "--model", str(smollm2)]
    job += ["--max-model-len", "1024", "--engine-arg", "enforce_eager=true"]
    done = ray("job", "submit", "--working-dir", ".", "--", *job, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    assert pq.read_table(output / "results").num_rows == 26
    assert pq.read_table(output / "steps").num_rows > 0
