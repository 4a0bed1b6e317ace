"""`ray job submit` of jobs/decode.py to a cluster on this machine, as a user of a cluster runs it."""

import pyarrow.parquet as pq
import pytest
from real_runs import cluster, engine_options, submit


def check(done, output, rows: int) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    assert pq.read_table(output / "results").num_rows == rows
    assert pq.read_table(output / "steps").num_rows > 0


def test_a_submitted_job_decodes(job_run):
    check(job_run.done, job_run.output, 6)


@pytest.mark.long
def test_a_submitted_job_decodes_the_demo_rows(smollm2, tmp_path):
    output = tmp_path / "out"
    job = ["python", "jobs/decode.py", "examples/demo.jsonl", "--output", str(output), "--model", str(smollm2)]
    job += engine_options()
    with cluster(tmp_path) as environment:
        check(submit(environment, job), output, 26)
