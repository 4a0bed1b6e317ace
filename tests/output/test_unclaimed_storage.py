"""Two runs at once on storage that can keep neither away: nothing is lost, and each row counts once."""

from collections import Counter

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from made_outputs import IDS, failed, read, wanted, without_id
from made_runs import decoded

from agd_vllm.output.relevance_writer import RelevanceWriter, TokenRelevance
from agd_vllm.output.run_reader import RunReader
from agd_vllm.output.summary import count_outputs, open_run
from agd_vllm.output.writer import RunWriter


class _LooksFirst(MemoryFileSystem):
    """As most file systems of fsspec: it looks whether there is a file, and creates one then."""

    protocol = "looks-first"
    store, pseudo_dirs = {}, [""]
    pipe_file = AbstractFileSystem.pipe_file

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("looks-first://"))


@pytest.fixture
def no_claims(request, s3, tmp_path):
    """The URL of an output on such storage."""
    fsspec.register_implementation("looks-first", _LooksFirst, clobber=True)
    return f"looks-first://{tmp_path.name}" if request.param == "looks first" else s3.url


@pytest.mark.parametrize(
    ("s3", "no_claims"),
    [("ignores conditions", "s3"), ("knows no conditions", "s3"), ("", "looks first")],
    indirect=True,
)
def test_two_runs_that_cannot_be_kept_apart_lose_nothing_and_count_rows_once(s3, no_claims, caplog):
    url = no_claims
    open_run(url, {}, resume=True)
    one, two = RunWriter(url), RunWriter(url)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot keep a second run away" in caplog.text
    for writer, names in ((one, IDS[:4]), (two, IDS[2:])):
        for name in names:
            writer.add(decoded(name))
        writer.fail(failed("r8"))
        writer.fail(without_id(9))
    two.fail(failed("r0"))
    fs, root = fsspec.url_to_fs(url)
    fs.pipe_file(f"{root}/steps/part-00009-alive.parquet", b"of a third run, whose results come next")
    for writer in (one, two):
        writer.close()
    three = RunWriter(url)
    assert all(name in three.completed_ids() for name in IDS)
    assert not three.fail(failed("r8")) and not three.fail(without_id(9))
    three.close()
    assert fs.exists(f"{root}/steps/part-00009-alive.parquet")
    assert len(fs.find(f"{root}/results")) == 2
    assert sorted(read(url)) == wanted(IDS) and sorted(RunReader(url).ids()) == IDS
    steps = pa.concat_tables(RunReader(url).step_columns(["step", "chosen_id"]))
    guided = sum(decoded(name).num_guided for name in IDS)
    assert steps.column_names == ["step", "chosen_id"] and steps.num_rows == guided
    counts = count_outputs(url)
    assert (counts["decoded"], counts["failed"], counts["guided_steps"]) == (6, 2, guided)
    assert not [name for name in fs.find(root) if "lease" in name or "clock" in name]


@pytest.mark.parametrize("s3", ["ignores conditions"], indirect=True)
def test_steps_that_two_runs_attributed_at_once_count_once(s3):
    def relevance(step):
        return TokenRelevance(step, 7, 1.5, np.arange(3 + step, dtype=np.float32))

    open_run(s3.url, {}, resume=True)
    one, two = RelevanceWriter(s3.url), RelevanceWriter(s3.url)
    one.add("r0", [relevance(0), relevance(2)])
    two.add("r0", [relevance(0), relevance(2), relevance(3)])
    one.close()
    two.close()
    with RelevanceWriter(s3.url) as writer:
        assert (writer.steps_of("r0"), writer.steps, writer.relevances) == (3, 3, 3)
    found = Counter(found["step"] for found in RunReader(s3.url).relevance(["r0"]))
    assert found == {0: 1, 2: 1, 3: 1}
