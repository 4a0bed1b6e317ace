"""`ray job submit` of jobs/decode.py to a cluster on this machine, as a user of a cluster runs it."""

import pyarrow.parquet as pq
import pytest
from real_runs import TOKENS, cluster, engine_options, short_rows, submit, write_rows


def tokens(output) -> dict[str, list[int]]:
    return {row["id"]: row["token_ids"] for row in pq.read_table(output / "results").to_pylist()}


@pytest.mark.long
def test_a_submitted_job_decodes_as_the_command_does(command_run, smollm2, tmp_path):
    """The demo's rows, by a path within the checkout, and rows that the command has decoded."""
    data, output = write_rows(tmp_path / "rows.jsonl", short_rows()), tmp_path / "out"
    job = ["python", "jobs/decode.py", "examples/demo.jsonl", str(data), "--output", str(output)]
    job += ["--model", str(smollm2), "--dtype", "float32", "--max-tokens", f"{TOKENS}", *engine_options()]
    with cluster(tmp_path) as environment:
        done = submit(environment, job)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    found, of_command = tokens(output), tokens(command_run.output)
    names = {row["id"] for row in short_rows()}
    assert len(found) == 26 + len(names)
    assert {name: found[name] for name in names} == {name: of_command[name] for name in names}
    assert pq.read_table(output / "steps").num_rows > 0
