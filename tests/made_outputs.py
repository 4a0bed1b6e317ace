"""Outputs written and read back by the real writers, with rows and errors that are functions of their names."""

from made_runs import decoded

from agd_vllm.output.run_reader import RunReader
from agd_vllm.output.writer import RunWriter
from agd_vllm.records import RowError

IDS = [f"r{number}" for number in range(6)]


def failed(name):
    return RowError({"id": name}, int(name[1:]), name, "poison", "too bad", "rows.jsonl")


def without_id(line):
    return RowError("{", line, None, "invalid_json", "no JSON", "rows.jsonl")


def write(url, rows=(), errors=()):
    with RunWriter(url) as writer:
        for name in rows:
            writer.add(decoded(name))
        for error in errors:
            writer.fail(error)


def read(url):
    """The rows of a run, each with its steps; as often as there are."""
    return [(row.id, row.num_guided) for row in RunReader(url).rows()]


def wanted(names):
    return [(name, decoded(name).num_guided) for name in names]
