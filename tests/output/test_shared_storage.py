"""Two runs on one output where storage has no locks, and what a run leaves there: a real S3 server, disks like NFS.

Run as a script (`test_shared_storage.py URL`) this file is the other process.
"""

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
from command_line import fails
from made_outputs import IDS, failed, read, wanted, without_id, write
from made_runs import decoded

from agd_vllm.output import lease
from agd_vllm.output.relevance_writer import RelevanceWriter
from agd_vllm.output.run_reader import RunReader
from agd_vllm.output.storage import OutputDirectory, OutputFailed
from agd_vllm.output.summary import count_outputs, open_run, write_summary
from agd_vllm.output.writer import RunWriter
from agd_vllm.pipeline.signals import as_interrupt

TAKEN = "another run has taken it over"


@pytest.fixture(autouse=True)
def no_thread(monkeypatch):
    """However slow the machine is: no lease is renewed on its own."""
    monkeypatch.setattr(lease, "RENEWED_EVERY", 3600.0)


def refused(url, another="another run is writing there"):
    with pytest.raises(OutputFailed, match=another) as failed:
        RunWriter(url)
    assert "\n" not in str(failed.value)
    return str(failed.value)


def expire(store):
    (name,) = [name for name in store.names() if name.startswith(".lease")]
    store.write(name, json.dumps(json.loads(store.read(name)) | {"expires_after": 0}).encode())


def other(store):
    """A process that holds the output, with a part and two errors there and a row in its buffer."""
    tests = Path(__file__).parents[1]
    environment = {**os.environ, **store.environment, "PYTHONPATH": os.pathsep.join(map(str, (tests.parent, tests)))}
    command = [sys.executable, __file__, store.url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True)
    assert process.stdout.readline() == "holding\n", process.communicate()
    return process


# A store with conditional creation


def test_a_second_run_is_refused_before_and_after_the_firsts_first_part(s3):
    open_run(s3.url, {"model": "m"}, resume=True)
    with RunWriter(s3.url) as writer:
        writer.add(decoded("r0"))
        assert re.search(r"its lease expires in \d+ s, at .* UTC$", refused(s3.url))
        writer.flush()
        refused(s3.url)
        writer.add(decoded("r1"))
    write(s3.url, ["r2"])
    assert read(s3.url) == wanted(["r0", "r1", "r2"])
    assert not [name for name in s3.names() if name.startswith(".")]


def test_of_two_runs_that_begin_at_once_the_first_one_says_what_the_run_is(s3, monkeypatch):
    from agd_vllm.output import summary

    claimed = summary.claimed

    def late(output):
        monkeypatch.setattr(summary, "claimed", claimed)
        open_run(s3.url, {"model": "first"}, resume=True)
        return claimed(output)

    monkeypatch.setattr(summary, "claimed", late)
    with pytest.raises(summary.OutputUnusable, match='model is "first" there and "second" here'):
        open_run(s3.url, {"model": "second"}, resume=True)
    assert json.loads(s3.read("run.json")) == {"model": "first"}


def test_a_run_whose_lease_is_taken_stops_writing_with_one_line(s3):
    open_run(s3.url, {}, resume=True)
    writer = RunWriter(s3.url)
    writer.add(decoded("r0"))
    expire(s3)
    with RunWriter(s3.url):
        names = s3.names()
        with pytest.raises(OutputFailed, match=TAKEN):
            writer._claim.renew()  # as its thread does now and then
        with pytest.raises(OutputFailed, match=TAKEN):
            writer.flush_if_due()
        with pytest.raises(OutputFailed, match=TAKEN) as failed, writer:
            writer.flush()
        assert "\n" not in str(failed.value)
        assert s3.names() == names, "a part, or the other one's lease removed"
    assert read(s3.url) == []


def test_a_run_that_loses_its_lease_between_steps_and_results_writes_none(s3, monkeypatch):
    """The other one has taken these steps for a dead run's, and removed them."""
    open_run(s3.url, {}, resume=True)
    writer = RunWriter(s3.url)
    writer.add(decoded("r1"))
    write_table = OutputDirectory.write_table

    def then_lose(output, name, table):
        write_table(output, name, table)
        patch.undo()
        expire(s3)
        write(s3.url, ["r2"])
        patch.setattr(lease, "EXPIRES_AFTER", 0.0)  # as long as that took

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputDirectory, "write_table", then_lose)
        with pytest.raises(OutputFailed, match=TAKEN):
            writer.flush()
    assert read(s3.url) == wanted(["r2"])
    assert len(s3.names("results")) == len(s3.names("steps")) == 1


def test_a_run_that_a_signal_ends_removes_its_lease(s3):
    process = other(s3)
    refused(s3.url)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "interrupted\n"), err
    assert not [name for name in s3.names() if "lease" in name or name.startswith("errors/")]
    assert len(s3.read("errors.jsonl").splitlines()) == 2
    write(s3.url, ["r2"])
    assert sorted(read(s3.url)) == wanted(["r0", "r1", "r2"])


def test_a_run_that_a_fault_ends_removes_its_lease(s3, monkeypatch):
    open_run(s3.url, {}, resume=True)

    def full(output, name, table):
        raise OutputFailed("no room")

    monkeypatch.setattr(OutputDirectory, "write_table", full)
    with pytest.raises(OutputFailed, match="no room"), RunWriter(s3.url) as writer:
        writer.add(decoded("r0"))
        writer.flush()
    assert not [name for name in s3.names() if "lease" in name]


def test_what_a_killed_run_left_waits_for_its_lease_to_expire(s3):
    process = other(s3)
    process.kill()
    process.communicate()
    line = refused(s3.url)
    assert f"process {process.pid} " in line
    s3.write("steps/part-00007-dead.parquet", b"PAR1")
    s3.write("results/.part-00007-dead.parquet.beef.tmp", b"PAR1")
    s3.write(".run.json.beef.tmp", b"{")
    expire(s3)
    with RunWriter(s3.url) as writer:
        assert "r0" in writer.completed_ids() and "r1" not in writer.completed_ids()
        assert not writer.fail(failed("r5")) and not writer.fail(without_id(4))
    assert not [name for name in s3.names() if "dead" in name or "lease" in name or name.endswith(".tmp")]


def test_parts_of_an_older_version_are_resumed(s3):
    open_run(s3.url, {"model": "m"}, resume=True)
    write(s3.url, IDS[:2], [without_id(1)])
    for folder in ("results", "steps"):
        (name,) = s3.names(folder)
        s3.move(f"{folder}/{name}", f"{folder}/part-00000.parquet")
    write(s3.url, IDS[:3], [without_id(1)])
    write(s3.url, IDS[3:])
    results = s3.names("results")
    assert results == s3.names("steps")
    assert [name[:10] for name in results] == ["part-00000", "part-00001", "part-00002"]
    assert read(s3.url) == wanted(IDS) and RunReader(s3.url).ids() == IDS
    counts = count_outputs(s3.url)
    assert (counts["decoded"], counts["failed"]) == (6, 1)
    assert counts["guided_steps"] == sum(steps for _, steps in read(s3.url))


# Disks


@pytest.fixture
def no_locks(monkeypatch):
    """As NFS without locks, which needs a server of its own."""

    def no_lock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_lock)


@pytest.fixture
def locks_of_one_machine(monkeypatch, tmp_path):
    """As NFS that is mounted with `nolock`: a lock is had, and says nothing of other machines."""
    mount = namedtuple("mount", ("mountpoint", "opts"))
    mounts = [mount("/", "rw"), mount(str(tmp_path), "rw,vers=3,nolock,local_lock=all"), mount(f"{tmp_path}x", "rw")]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)


@pytest.mark.parametrize("disk", ["no_locks", "locks_of_one_machine"])
def test_on_a_disk_without_locks_a_lease_keeps_a_second_run_away(tmp_path, disk, request):
    request.getfixturevalue(disk)
    url = str(tmp_path / "out")
    open_run(url, {}, resume=True)
    with RunWriter(url) as writer:
        assert "its lease expires in" in refused(url)
        writer.add(decoded("r0"))
        writer.fail(failed("r1"))
        writer.flush()
        refused(url)
        assert len((tmp_path / "out/errors.jsonl").read_bytes().splitlines()) == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {
        "run.json",
        "results",
        "steps",
        "errors.jsonl",
        ".lock",
    }
    assert read(url) == wanted(["r0"])


def test_a_disk_with_neither_locks_nor_exclusive_creation(tmp_path, no_locks, monkeypatch, caplog):
    def opens(path, mode="r", *more, **options):
        if "x" in mode:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return open(path, mode, *more, **options)

    monkeypatch.setattr("agd_vllm.output.storage.open", opens, raising=False)
    one, two = RunWriter(str(tmp_path)), RunWriter(str(tmp_path))
    assert len(caplog.records) == 1
    for writer, name in ((one, "r0"), (two, "r1"), (one, "r2")):
        writer.add(decoded(name))
        writer.fail(without_id(int(name[1:])))
        writer.flush()
    one.close()
    two.close()
    names = [path.name for path in (tmp_path / "results").iterdir()]
    assert sorted(name[:10] for name in names) == ["part-00000", "part-00000", "part-00001"]
    counts = count_outputs(str(tmp_path))
    assert (counts["decoded"], counts["failed"]) == (3, 3)


def test_a_dataset_whose_lease_is_taken_ends_with_one_line_and_no_summary(dataset, no_locks, monkeypatch):
    """A stand-in decodes; a disk without locks is in the store's place."""
    taken = []

    def take(number):
        if number == 3:
            (own,) = dataset.output.glob(".lease-*")
            taken.append(own.with_name(".lease-0000000001"))
            taken[0].write_text('{"token": "of another run"}')
            monkeypatch.setattr(lease, "EXPIRES_AFTER", 0.0)  # as long as that took

    run, error = dataset(at_row=take)
    assert isinstance(error, OutputFailed) and TAKEN in str(error) and "\n" not in str(error)
    assert run.rows_on_disk_at_close == 0 and not list(dataset.output.glob("results/part-*"))
    assert taken[0].exists() and not (dataset.output / "summary.json").exists()


def test_calibrate_and_attribute_are_refused_alike(tmp_path, no_locks, smollm2, capsys):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text('{"id": "a", "prompt": "Hi"}\n')
    out.mkdir()
    model = ("--model", str(smollm2))
    (out / ".lease-0000000000").write_text('{"expires_after": 990}')
    line = fails(capsys, 1, "calibrate", str(rows), *model, "--output", str(out))
    assert "another run is writing there" in line and "its lease expires in 9" in line
    run = tmp_path / "run"
    open_run(str(run), {"model": str(smollm2), "strategy": "agd"}, resume=True)
    write(str(run), ["a"])
    write_summary(str(run), {"decoded": 1})
    (run / "relevance").mkdir()
    (run / "relevance/.lease-0000000000").write_text('{"expires_after": 990}')
    with pytest.raises(OutputFailed, match="another run is writing there"):
        RelevanceWriter(str(run))
    assert [path.name for path in (run / "relevance").iterdir() if "lease" in path.name] == [".lease-0000000000"]


if __name__ == "__main__":
    (url,) = sys.argv[1:]
    open_run(url, {}, resume=True)
    try:
        with as_interrupt(), RunWriter(url) as writer:
            writer.add(decoded("r0"))
            writer.fail(failed("r5"))
            writer.fail(without_id(4))
            writer.flush()
            writer.add(decoded("r1"))
            print("holding", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.exit(1)
