"""Failed rows on object stores, where nothing can be appended: parts while a run writes, one file at its end."""

import json

import pytest
from made_outputs import failed, without_id, write

from agd_vllm.output.summary import count_outputs
from agd_vllm.output.writer import RunWriter


def test_errors_are_parts_while_a_run_writes_and_one_file_at_its_end(s3):
    write(s3.url, errors=[failed("r1")])
    first = s3.read("errors.jsonl")
    with RunWriter(s3.url) as writer:
        for name in ("r2", "r3"):
            writer.fail(failed(name))
            writer.flush()
        assert s3.read("errors.jsonl") == first, "read and written whole at each flush"
        assert len(s3.names("errors")) == 2
        assert count_outputs(s3.url)["failed"] == 3
    lines = s3.read("errors.jsonl").splitlines(keepends=True)
    assert b"".join(lines).startswith(first) and [json.loads(line)["id"] for line in lines] == ["r1", "r2", "r3"]
    assert not s3.names("errors")
    assert count_outputs(s3.url)["failed"] == 3


@pytest.mark.parametrize("gone", [0, 1])
def test_a_death_between_merging_errors_and_removing_their_parts_doubles_none(s3, gone):
    write(s3.url, errors=[failed("r1")])
    writer = RunWriter(s3.url)
    for error in (without_id(2), without_id(3)):
        writer.fail(error)
        writer.flush()
    left = [(f"errors/{name}", s3.read(f"errors/{name}")) for name in s3.names("errors")]
    writer.close()
    merged = s3.read("errors.jsonl")
    for name, data in left[gone:]:
        s3.write(name, data)
    assert count_outputs(s3.url)["failed"] == 3
    with RunWriter(s3.url) as writer:
        assert not writer.fail(without_id(2)) and not writer.fail(without_id(3))
    assert s3.read("errors.jsonl") == merged and not s3.names("errors")


def test_errors_on_a_disk_are_appended_as_they_come(tmp_path):
    with RunWriter(str(tmp_path)) as writer:
        writer.fail(failed("r1"))
        writer.flush()
        assert len((tmp_path / "errors.jsonl").read_bytes().splitlines()) == 1
        assert not (tmp_path / "errors").exists()
