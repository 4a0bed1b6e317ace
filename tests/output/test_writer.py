"""Rows out: what the output directory holds, and that no death, fault or input line loses or doubles a row.

Run as a script (`test_writer.py MODE DIRECTORY`) this file is the process that dies.
"""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_runs import decoded
from tiny_tokenizers import tiny

from agd_vllm.input.reader import read_rows
from agd_vllm.output.claim import LOCK
from agd_vllm.output.storage import OutputFailed
from agd_vllm.output.summary import OutputUnusable, count_outputs, open_run, write_summary
from agd_vllm.output.writer import RunWriter
from agd_vllm.pipeline.source import Source
from agd_vllm.prompts.prepare import Preparer
from agd_vllm.records import InputRow, RowError

ENDINGS = (b"\n", b"\n\n", b" \r\n")


def run(inputs, directory, part_rows=5, after_row=lambda: None):
    """The decoder's loop, with `decoded` in place of a model."""
    open_run(directory, {"inputs": list(inputs)}, resume=True)
    with RunWriter(directory, part_rows) as writer:
        for row in read_rows(inputs):
            if isinstance(row, RowError):
                writer.fail(row)
            elif row.id not in writer.completed_ids():
                writer.add(decoded(row.id, row.metadata))
            after_row()


def run_prepared(path, directory):
    """As `run`, with everything between reader and engine: template, tokens, region, limits."""
    preparer = Preparer(tiny("byte_level", "chatml"), default_roi=None, guided=True, max_tokens=8, max_model_len=512)
    with RunWriter(directory, 15) as writer:
        rows = read_rows([path])
        source = Source((row for row in rows if isinstance(row, RowError) or not seen_by(writer, row)), preparer)
        while not source.exhausted:
            ready = source.take(8)
            for error in source.refused():
                writer.fail(error)
            for row in ready:
                assert row.prompt_token_ids and all(0 <= span.start < span.end for span in row.roi.spans)
                writer.add(source.outcome(decoded(row.id)))


def seen_by(writer, row):
    return row.id in writer.completed_ids()


def parts(directory, folder):
    return {path.name: path.read_bytes() for path in sorted(Path(directory, folder).glob("part-*.parquet"))}


def first_part(directory, folder):
    return min(Path(directory, folder).glob("part-*.parquet"))


def table(directory, folder):
    tables = [pq.read_table(path) for path in sorted(Path(directory, folder).glob("part-*.parquet"))]
    return pa.concat_tables(tables).to_pylist() if tables else []


def kind(type):
    return f"list<{type.value_type}>" if pa.types.is_list(type) else str(type)


def errors(directory):
    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    data = Path(directory, "errors.jsonl").read_bytes()
    assert data == b"" or data.endswith(b"\n")
    return [json.loads(line.decode(), parse_constant=no_constant) for line in data.split(b"\n")[:-1]]


def check_complete(inputs, directory):
    """Every row of the inputs is in results, with its steps, or in errors, once; and nothing else is there."""
    rows = list(read_rows(inputs))
    results, steps = table(directory, "results"), table(directory, "steps")
    assert Counter(row["id"] for row in results) == Counter(row.id for row in rows if isinstance(row, InputRow))
    expected = Counter((row.line, row.id, row.type) for row in rows if isinstance(row, RowError))
    assert Counter((error["line"], error["id"], error["error"]["type"]) for error in errors(directory)) == expected
    held = Counter(step["id"] for step in steps)
    assert all(row["num_guided"] == held[row["id"]] == len(decoded(row["id"]).steps) for row in results)
    assert held.total() == sum(row["num_guided"] for row in results)
    assert not [path.name for path in Path(directory).rglob("*.tmp")]
    counts = count_outputs(str(directory))
    assert (counts["decoded"], counts["failed"]) == (len(results), expected.total())


def mixed_input(path, count):
    """Good rows, bad rows, rows without an id (two of them alike but for their line), and duplicates."""
    lines = []
    for i in range(count):
        bad = {3: b"{", 5: b'{"id": "x%d", "n": 2}' % i, 8: b'{"id": "r0", "prompt": "again"}'}
        lines.append(bad.get(i % 10, b'{"id": "r%d", "prompt": "x"}' % i) + ENDINGS[i % 3])
    path.write_bytes(b"".join(lines))
    return str(path)


# What is written


def test_the_output_is_as_the_contract_says(tmp_path):
    with RunWriter(str(tmp_path / "out")) as writer:
        writer.add(decoded("é1", '{"k": 1}'))
        writer.fail(RowError({"id": "é2", "x": 1}, 7, "é2", "some_type", "what went wrong", "rows.jsonl"))
        writer.fail(RowError("{", 9, None, "invalid_json", "no JSON: \ud800"))
        writer.add(decoded("a"))
    results = pq.read_table(first_part(tmp_path / "out", "results"))
    steps = pq.read_table(first_part(tmp_path / "out", "steps"))
    assert dict(zip(results.schema.names, map(kind, results.schema.types), strict=True)) == {
        "id": "string",
        "text": "string",
        "token_ids": "list<int32>",
        "prompt_token_ids": "list<int32>",
        "roi_spans": "list<struct<start: int32, end: int32, weight: float>>",
        "finish_reason": "string",
        "num_guided": "int32",
        "metadata": "string",
    }
    assert dict(zip(steps.schema.names, map(kind, steps.schema.types), strict=True)) == {
        "id": "string",
        "step": "int32",
        "entropy": "float",
        "candidate_ids": "list<int32>",
        "candidate_probs": "list<float>",
        "scores": "list<float>",
        "chosen_id": "int32",
        "greedy_id": "int32",
    }
    wanted = decoded("é1")
    assert results.to_pylist()[0] == {
        "id": "é1",
        "text": "üé1",
        "token_ids": wanted.token_ids,
        "prompt_token_ids": [1, 2, 3],
        "roi_spans": [{"start": 0, "end": 2, "weight": -0.5}],
        "finish_reason": "length",
        "num_guided": len(wanted.steps),
        "metadata": '{"k": 1}',
    }
    assert [(s["step"], s["chosen_id"], s["greedy_id"]) for s in steps.to_pylist() if s["id"] == "é1"] == [
        (s.step, s.chosen_id, s.greedy_id) for s in wanted.steps
    ]
    assert steps.to_pylist()[0]["candidate_probs"] == [0.5, 0.25]
    file = pq.ParquetFile(first_part(tmp_path / "out", "steps"))
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    first, second = errors(tmp_path / "out")
    fault = {"type": "some_type", "message": "what went wrong"}
    assert first == {"input": {"id": "é2", "x": 1}, "file": "rows.jsonl", "line": 7, "id": "é2", "error": fault}
    assert (second["input"], second["id"], second["error"]["message"]) == ("{", None, "no JSON: \ud800")


def test_rows_become_durable_by_number_time_and_size(tmp_path):
    writer = RunWriter(str(tmp_path), part_rows=3, part_seconds=1000)
    writer.add(decoded("a"))
    writer.fail(RowError("x", 1, None, "t", "m"))
    assert not parts(tmp_path, "results")
    writer.add(decoded("b"))
    assert [row["id"] for row in table(tmp_path, "results")] == ["a", "b"]
    assert len(errors(tmp_path)) == 1
    writer.fail(RowError("x" * (17 << 20), 2, None, "t", "m"))
    assert len(errors(tmp_path)) == 2
    writer.close()
    assert len(parts(tmp_path, "results")) == 1, "a part without rows"
    with RunWriter(str(tmp_path), part_seconds=0.2) as writer:
        time.sleep(0.25)  # time without rows does not count
        writer.add(decoded("c"))
        writer.flush_if_due()
        assert len(parts(tmp_path, "results")) == 1
        time.sleep(0.25)
        writer.flush_if_due()
        assert list(parts(tmp_path, "results")) == list(parts(tmp_path, "steps"))
        names = [name.rpartition("-") for name in parts(tmp_path, "results")]
        assert [number for number, _, _ in names] == ["part-00000", "part-00001"]
        assert len({process for _, _, process in names}) == 2


def test_a_row_is_taken_once(tmp_path):
    with RunWriter(str(tmp_path), part_rows=2) as writer:
        assert writer.add(decoded("a"))
        assert not writer.add(decoded("a"))
        assert not writer.fail(RowError({}, 1, "a", "poison", "m"))
        assert writer.fail(RowError({}, 2, "b", "poison", "m"))
        assert not writer.add(decoded("b"))
        assert not writer.fail(RowError({}, 2, "b", "poison", "m"))
    with RunWriter(str(tmp_path)) as writer:
        assert "a" in writer.completed_ids() and "b" in writer.completed_ids() and len(writer.completed_ids()) == 2
        assert not writer.add(decoded("b"))
        assert not writer.fail(RowError({}, 1, "a", "poison", "m"))
    assert len(table(tmp_path, "results")) == len(errors(tmp_path)) == 1


def test_errors_of_rows_without_an_id_are_recorded_once_for_each_row(tmp_path):
    alike = RowError("{", 3, None, "invalid_json", "m")
    with RunWriter(str(tmp_path)) as writer:
        assert writer.fail(alike)
        assert writer.fail(alike), "line 3 of a second file"
        assert writer.fail(RowError({"id": "a"}, 4, "a", "duplicate_id", "m"))
        assert "a" not in writer.completed_ids(), "the first row of that id is still to be decoded"
    with RunWriter(str(tmp_path)) as writer:
        assert "a" not in writer.completed_ids()
        assert not writer.fail(alike)
        assert not writer.fail(alike)
        assert not writer.fail(RowError({"id": "a"}, 4, "a", "duplicate_id", "another wording"))
        assert writer.fail(alike), "and of a third"
        assert writer.add(decoded("a"))
    assert len(errors(tmp_path)) == 4


class _Elsewhere(MemoryFileSystem):
    """In the place of storage that is not local."""

    protocol = "elsewhere"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("elsewhere://"))


@pytest.mark.parametrize("place", ["elsewhere", "local url"])
def test_fsspec_urls(tmp_path, place):
    fsspec.register_implementation("elsewhere", _Elsewhere, clobber=True)
    url = f"elsewhere://test_writer/{tmp_path.name}" if place == "elsewhere" else f"file://{tmp_path}/out"
    source = mixed_input(tmp_path / "rows.jsonl", 40)
    half = tmp_path / "half.jsonl"
    half.write_bytes(b"".join((tmp_path / "rows.jsonl").read_bytes().splitlines(keepends=True)[:25]))
    for part in (str(half), source):
        with RunWriter(url, part_rows=5) as writer:
            for row in read_rows([part]):
                writer.fail(row) if isinstance(row, RowError) else writer.add(decoded(row.id))
    write_summary(url, {"seconds": 1.5})
    fs, root = fsspec.url_to_fs(url)
    assert json.loads(fs.cat(f"{root}/summary.json")) == {"seconds": 1.5}
    fs.get(f"{root}/", f"{tmp_path}/copy/", recursive=True)
    check_complete([source], tmp_path / "copy")


@pytest.mark.parametrize("url", ["memory://out", "memory:///a/out", "simplecache::memory://out", "dir::memory://out"])
def test_an_output_in_memory_is_refused_before_anything_is_decoded(url):
    for opens in (lambda: open_run(url, {}, resume=True), lambda: RunWriter(url), lambda: write_summary(url, {})):
        with pytest.raises(ValueError, match=f"^output {url}: what is in memory is gone .* give a folder or a URL$"):
            opens()


# After a death


def test_what_a_dead_run_left_is_mended_and_parts_are_never_touched(tmp_path):
    source = mixed_input(tmp_path / "rows.jsonl", 60)
    out = tmp_path / "out"
    run([source], str(out))
    before = parts(out, "results") | {f"steps {name}": data for name, data in parts(out, "steps").items()}
    *_, torn, _, last = parts(out, "results")
    (out / "results" / last).unlink()
    (out / "results" / torn).write_bytes((out / "results" / torn).read_bytes()[:-9])
    (out / "results/.part-00099.parquet.tmp").write_bytes(b"PAR1")
    (out / "steps/.part-00099.parquet.tmp").write_bytes(b"PAR1")
    (out / ".summary.json.tmp").write_bytes(b"{")
    text = (out / "errors.jsonl").read_bytes()
    (out / "errors.jsonl").write_bytes(text[: text.rindex(b'"line"')])
    RunWriter(str(out)).close()
    assert parts(out, "results").keys() == parts(out, "steps").keys()
    assert last not in parts(out, "steps") and torn not in parts(out, "results")
    assert (out / f"results/.{torn}.torn").exists(), "unreadable data is set aside, not deleted"
    assert (out / "errors.jsonl").read_bytes() == text[: text[:-1].rindex(b"\n") + 1]
    run([source], str(out))
    check_complete([source], out)
    now = parts(out, "results") | {f"steps {name}": data for name, data in parts(out, "steps").items()}
    for name, data in before.items():
        assert name.split()[-1] in (last, torn) or now[name] == data


def test_a_damaged_output_is_told_of_in_one_line(tmp_path):
    RunWriter(str(tmp_path)).close()
    (tmp_path / "errors.jsonl").write_bytes(b"no JSON\n")
    with pytest.raises(OutputFailed, match=r"^output .*/errors\.jsonl: .*$"):
        RunWriter(str(tmp_path))
    assert (tmp_path / "errors.jsonl").read_bytes() == b"no JSON\n"


def script(mode, directory, *more, **options):
    command = [sys.executable, __file__, mode, str(directory), *map(str, more)]
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tests.parent, tests)))}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def test_kill_9_at_random_moments(tmp_path):
    source = mixed_input(tmp_path / "rows.jsonl", 400)
    out = tmp_path / "out"
    moments = random.Random(5)
    before = {}
    for _ in range(4):
        child = script("run", out, source)
        for _ in range(moments.randrange(20, 95)):
            child.stdout.readline()
        time.sleep(moments.random() / 100)
        child.kill()
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        now = parts(out, "results")
        assert before.items() <= now.items(), "a part that was in place has changed"
        assert now.keys() <= parts(out, "steps").keys()
        ids = [row["id"] for row in table(out, "results")]
        assert len(ids) == len(set(ids))
        before = now
    assert before
    child = script("run", out, source)
    child.communicate()
    assert child.returncode == 0
    assert before.items() <= parts(out, "results").items()
    check_complete([source], out)


@pytest.mark.parametrize("fault", ["kill", "full"])
def test_a_death_or_a_full_disk_at_each_file_operation(tmp_path, fault):
    source = mixed_input(tmp_path / "rows.jsonl", 11)
    child = script(f"each-{fault}", tmp_path, source)
    _, log = child.communicate()
    assert child.returncode == 0, log
    outputs = list(tmp_path.glob("out-*"))
    assert len(outputs) > 30
    for out in outputs:
        check_complete([source], out)


def test_a_file_that_may_not_grow_ends_the_run_with_one_line_and_damages_nothing(tmp_path):
    source = mixed_input(tmp_path / "rows.jsonl", 400)
    out = tmp_path / "out"
    child = script("run", out, source, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3500, 3500)))
    _, log = child.communicate()
    assert child.returncode == 1
    assert log.startswith("OutputFailed: output ") and "File too large" in log and log.count("\n") == 1
    assert parts(out, "results").keys() == parts(out, "steps").keys()
    assert len(table(out, "results")) > 10
    assert len(errors(out)) > 5, "whole lines only"
    run([source], str(out))
    check_complete([source], out)


def test_a_failed_write_can_be_tried_again(tmp_path):
    writer = RunWriter(str(tmp_path))
    writer.add(decoded("a"))
    writer.fail(RowError("x" * 3000, 1, None, "t", "m"))
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, unlimited[1]))
    try:
        with pytest.raises(OutputFailed, match=r"File too large"):
            writer.flush()
        assert not list(tmp_path.rglob("*.tmp")), "a full disk is not left fuller"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        signal.signal(signal.SIGXFSZ, ignored)
    writer.close()
    assert [row["id"] for row in table(tmp_path, "results")] == ["a"]
    assert len(errors(tmp_path)) == 1


def test_two_runs_cannot_write_at_once(tmp_path):
    source = mixed_input(tmp_path / "rows.jsonl", 5)
    open_run(str(tmp_path / "out"), {"inputs": [source]}, resume=True)
    with RunWriter(str(tmp_path / "out")):
        child = script("run", tmp_path / "out", source)
        _, log = child.communicate()
        assert child.returncode == 1 and "another run is writing there" in log


# What a run is


IDENTITY = {"model": "m", "strategy": "agd", "parameters": {"tau": 1.734, "top_k": 5}, "inputs": ["a.jsonl"]}


def test_a_run_is_continued_only_as_it_was(tmp_path):
    out = str(tmp_path / "deep/out")
    open_run(out, IDENTITY, resume=False)
    assert json.loads(Path(out, "run.json").read_text()) == IDENTITY
    open_run(out, IDENTITY, resume=True)
    other = {**IDENTITY, "model": "n", "parameters": {"tau": float("inf"), "top_k": 5}}
    with pytest.raises(OutputUnusable) as unusable:
        open_run(out, other, resume=True)
    assert 'model is "m" there and "n" here; parameters.tau is 1.734 there and null here' in str(unusable.value)
    assert "top_k" not in str(unusable.value) and "\n" not in str(unusable.value)
    with pytest.raises(OutputUnusable, match="holds a run already"):
        open_run(out, IDENTITY, resume=False)
    assert json.loads(Path(out, "run.json").read_text()) == IDENTITY


def test_a_run_that_died_at_its_start_can_start_again(tmp_path):
    (tmp_path / ".run.json.tmp").write_bytes(b"{")
    (tmp_path / ".lock").touch()
    open_run(str(tmp_path), IDENTITY, resume=False)
    assert json.loads((tmp_path / "run.json").read_text()) == IDENTITY


def test_directories_that_are_no_place_for_a_run(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    for resume in (True, False):
        with pytest.raises(OutputUnusable, match="is not empty and holds no run"):
            open_run(str(tmp_path), IDENTITY, resume)
    for path in (tmp_path / "thesis.txt", tmp_path / "thesis.txt/out"):
        with pytest.raises(OutputUnusable, match=r"is a file|Not a directory"):
            open_run(str(path), IDENTITY, True)
    with pytest.raises(OutputUnusable, match="Protocol not known"):
        open_run("nowhere://out", IDENTITY, True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "thesis.txt").rename(tmp_path / "run.json")
    with pytest.raises(OutputUnusable, match=r"run\.json"):
        open_run(str(tmp_path), IDENTITY, True)


def test_the_summary_is_json_and_counts_the_whole_directory(tmp_path):
    source = mixed_input(tmp_path / "rows.jsonl", 30)
    out = str(tmp_path / "out")
    run([source], out)
    rows = [decoded(row.id) for row in read_rows([source]) if isinstance(row, InputRow)]
    counts = count_outputs(out)
    assert counts == {
        "rows": 30,
        "decoded": 21,
        "failed": 9,
        "prompt_tokens": 63,
        "output_tokens": sum(len(row.token_ids) for row in rows),
        "guided_steps": sum(row.num_guided for row in rows),
        "changed_tokens": sum(step.chosen_id != step.greedy_id for row in rows for step in row.steps),
    }
    assert 0 < counts["changed_tokens"] < counts["guided_steps"]
    orphan = Path(out, "steps/part-00077.parquet")
    orphan.write_bytes(first_part(out, "steps").read_bytes())
    assert count_outputs(out) == counts, "steps without results are of a run that died"
    write_summary(out, {**counts, "tau": float("inf"), "means": [float("nan"), 1.5], "seconds": 2.0})
    assert json.loads(Path(out, "summary.json").read_text()) == {
        **counts,
        "tau": None,
        "means": [None, 1.5],
        "seconds": 2.0,
    }
    assert count_outputs(str(tmp_path / "nothing"))["rows"] == 0


# Hostile lines

TEXTS = st.text(st.characters(), max_size=20) | st.sampled_from(["\ud800", "\x00", "\u2028", "🏴‍☠️", "<|im_end|>"])
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -(10**5), 1e308, True])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)
IDS = st.sampled_from(["a", "b", "../../etc/passwd", "é"]) | TEXTS | st.integers(0, 9).map(str)
CONTENTS = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "tool"]) | VALUES, "content": TEXTS | VALUES}
)
ROWS = st.fixed_dictionaries(
    {"id": IDS | VALUES},
    optional={
        "prompt": TEXTS | VALUES,
        "messages": st.lists(CONTENTS, max_size=3) | VALUES,
        "roi": st.lists(VALUES | st.just({"chars": [0, 1]}), max_size=2) | VALUES,
        "max_tokens": NUMBERS,
        "stop": VALUES,
        "metadata": VALUES,
        "temperature": NUMBERS,
    },
)
GOOD = st.builds(lambda id, text, data: {"id": id, "prompt": text or "x", "metadata": data}, IDS, TEXTS, VALUES)
OPENAI = st.builds(lambda id, body: {"custom_id": id, "body": body}, IDS, ROWS | VALUES)
ENCODED = st.builds(
    lambda row, ascii: json.dumps(row, ensure_ascii=ascii).encode(errors="surrogatepass"),
    GOOD | ROWS | OPENAI | VALUES,
    st.booleans(),
)
BROKEN = st.builds(
    lambda line, cut, junk: line[:cut] + junk + line[cut:], ENCODED, st.integers(0, 80), st.binary(max_size=4)
)
NESTED = st.integers(1, 3000).map(
    lambda depth: b'{"id":"n","prompt":"x","metadata":' + b"[" * depth + b"]" * depth + b"}"
)
LINES = (ENCODED | ENCODED | BROKEN | ENCODED.map(lambda line: line[:-2]) | NESTED | st.binary(max_size=30)).map(
    lambda line: line.replace(b"\n", b" ")
)
seen = Counter()


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(st.lists(LINES, min_size=20, max_size=30))
def each_line_ends_in_exactly_one_place(base, lines):
    seen["runs"] += 1
    directory = base / f"{seen['runs']}"
    directory.mkdir()
    lines.insert(0, b"{}")  # what begins as something else than JSON lines is another file
    (directory / "rows.jsonl").write_bytes(b"\n".join(lines))
    source, out = str(directory / "rows.jsonl"), directory / "out"
    run_prepared(source, str(out))
    filled = {number for number, line in enumerate(lines, start=1) if line.strip()}
    line_of = {row.id: row.line for row in read_rows([source]) if isinstance(row, InputRow)}
    results = [line_of[row["id"]] for row in table(out, "results")]
    failed = [error["line"] for error in errors(out)]
    assert sorted(results + failed) == sorted(filled)
    for row in table(out, "results"):
        json.loads(row["metadata"])
    again = parts(out, "results")
    assert {path.name for path in directory.iterdir()} == {"rows.jsonl", "out"}, "a row wrote somewhere else"
    assert {path.name for path in out.iterdir()} <= {"results", "steps", "errors.jsonl", LOCK}
    run_prepared(source, str(out))
    assert (parts(out, "results"), [error["line"] for error in errors(out)]) == (again, failed)
    seen.update(lines=len(filled), decoded=len(results), failed=len(failed))


def test_each_of_many_hostile_lines_ends_in_exactly_one_place(tmp_path):
    seen.clear()
    each_line_ends_in_exactly_one_place(tmp_path)
    assert seen["lines"] >= 2000 and seen["decoded"] >= 100 and seen["failed"] >= 1000, seen


# The process that dies

FINISHED = 3


def run_with_fault(number, fault, source, out):
    """A run in which `fault` comes before the file operation of that number (Python's audit events show them)."""
    operations = 0

    def hook(event, arguments):
        nonlocal operations
        if event in ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir") and str(out) in str(arguments[0]):
            operations += 1
            if operations == number:
                fault()

    sys.addaudithook(hook)
    run([source], str(out))
    return FINISHED if operations < number else 0


def forked(action):
    """The status of a child process that does `action`: what it returns, or minus the signal that ended it."""
    child = os.fork()
    if not child:
        try:
            status = action() or 0
        except (OutputFailed, OutputUnusable):
            os._exit(1)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(2)
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def each_operation(fault, base, source, statuses):
    """Runs with a fault at the first file operation, then with one at the second..., each resumed undisturbed."""
    for number in range(1, 1000):
        out = base / f"out-{number}"
        open_run(str(out), {"inputs": [source]}, resume=True)
        status = forked(lambda number=number, out=out: run_with_fault(number, fault, source, out))
        assert status in statuses, (number, status)
        assert forked(lambda out=out: run([source], str(out))) == 0, number
        if status == FINISHED:
            return


def no_space():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


if __name__ == "__main__":
    mode, directory, source = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    if mode == "run":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            run([source], str(directory), after_row=lambda: print(flush=True))
        except OutputFailed as failed:
            sys.exit(f"OutputFailed: {failed}")
    elif mode == "each-kill":
        each_operation(lambda: os.kill(os.getpid(), signal.SIGKILL), directory, source, [-signal.SIGKILL, FINISHED])
    else:
        # 0: Python itself takes no notice of a fault in making a folder that is there.
        each_operation(no_space, directory, source, [1, 0, FINISHED])
