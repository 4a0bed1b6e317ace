"""Benchmark files in their published formats: what becomes of a record, and what is said of one that is none."""

import gzip
import json

import pytest

from agd_vllm.evaluation.suites import SuiteUnusable, read_suite

IHEVAL = {
    "id": 7,
    "system": "Use no commas.",
    "instruction": "Write a poem.",
    "answer": {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
}
IFEVAL = {
    "key": 1000,
    "prompt": "Write a poem. Mention the sea twice.",
    "instruction_id_list": ["keywords:frequency"],
    "kwargs": [{"keyword": "sea", "frequency": 2, "relation": "at least", "language": None}],
}
QUESTIONS = [
    {
        "question": f"which colour is thing {number}",
        "answers": [f"colour{number}"],
        "ctxs": [{"title": "Things", "text": f"Thing {number} is colour{number}.", "isgold": True}],
    }
    for number in range(8)
]


def write(path, records, *, as_list=False):
    text = json.dumps(records) if as_list else "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def marked(row):
    """The text of the row's region, which is the first selector's."""
    (selector,) = row["roi"]
    content = row["messages"][selector["message"]]["content"]
    start, end = selector.get("chars", (0, len(content)))
    return content[start:end]


def test_iheval_has_its_rules_in_the_system_prompt(tmp_path):
    (row,) = read_suite("iheval", write(tmp_path / "a.json", [IHEVAL], as_list=True))
    assert (row["id"], marked(row)) == ("7", "Use no commas.")
    assert [message["role"] for message in row["messages"]] == ["system", "user"]
    assert row["metadata"] == IHEVAL["answer"]


@pytest.mark.parametrize("suite", ["ifeval", "ifbench"])
def test_rules_in_the_user_message_and_arguments_that_are_null(tmp_path, suite):
    (row,) = read_suite(suite, write(tmp_path / "a.jsonl.gz", [IFEVAL]))
    assert (row["id"], marked(row)) == ("1000", IFEVAL["prompt"])
    assert row["metadata"]["kwargs"] == [{"keyword": "sea", "frequency": 2, "relation": "at least"}]


def test_ifbench_comes_with_its_package():
    rows = read_suite("ifbench", None)
    assert len(rows) == len({row["id"] for row in rows}) == 294


def test_nq_has_its_passage_as_region(tmp_path):
    rows = read_suite("nq", write(tmp_path / "a.jsonl", QUESTIONS))
    assert [marked(row) for row in rows] == [record["ctxs"][0]["text"] for record in QUESTIONS]
    assert rows[3]["metadata"] == {"question": "which colour is thing 3", "answers": ["colour3"]}


def test_distractors_are_other_passages_and_the_same_for_a_seed(tmp_path):
    # One asks of the same passage again, one has a passage that would answer another question.
    records = [
        *QUESTIONS,
        {**QUESTIONS[0], "question": "what is known of thing 0"},
        {"question": "what is rare", "answers": ["rare"], "ctxs": [{"text": "Things in colour3 are rare."}]},
    ]
    path = write(tmp_path / "a.jsonl", records)
    rows = read_suite("nq", path, distractors=4, seed=1)
    first = []
    for row, record in zip(rows, records, strict=True):
        documents = [document.partition(": ")[2] for document in marked(row).split("\n\n")]
        assert len(set(documents)) == len(documents) == 5
        assert record["ctxs"][0]["text"] in documents
        # No other passage holds the answer, and the question stands outside the region.
        assert sum(record["answers"][0] in document for document in documents) == 1
        assert record["question"] not in marked(row)
        first.append(documents.index(record["ctxs"][0]["text"]))
    assert len(set(first)) > 1
    with pytest.raises(SuiteUnusable, match=r"8 distractors are more than the file has for .* thing 3"):
        read_suite("nq", path, distractors=8)
    assert read_suite("nq", path, distractors=4, seed=1) == rows != read_suite("nq", path, distractors=4, seed=2)


def test_jsonl_rows_are_taken_as_they_are(tmp_path):
    rows = [
        {"id": "a", "prompt": "Hi\u2028there", "roi": [{"chars": [0, 2]}], "metadata": {"answers": ["x"]}},
        {"custom_id": "b", "body": {"messages": [], "metadata": {"instruction_id_list": ["x:y"], "kwargs": [None]}}},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert read_suite("jsonl", str(path)) == rows


@pytest.mark.parametrize(
    ("suite", "records", "word"),
    [
        ("iheval", [IHEVAL, {**IHEVAL, "answer": {}}], "record 2 is no record of iheval: it has no 'instruction_id_"),
        ("iheval", [{"id": 1}], "it has no 'answer'"),
        ("iheval", [["not", "an", "object"]], "record 1 is no record"),
        ("ifeval", [{**IFEVAL, "kwargs": []}], "same length"),
        ("ifeval", [{**IFEVAL, "instruction_id_list": "punctuation:no_comma"}], "lists"),
        ("ifeval", [{**IFEVAL, "instruction_id_list": [], "kwargs": []}], "at least one rule"),
        ("ifeval", [{**IFEVAL, "kwargs": [7]}], "record 1"),
        ("nq", [{**QUESTIONS[0], "ctxs": []}], "non-empty"),
        ("nq", [{**QUESTIONS[0], "answers": "blue"}], "answers"),
        ("nq", [{**QUESTIONS[0], "question": None}], "non-empty strings"),
        ("jsonl", [{"id": "a", "prompt": "Hi"}], "it has no 'metadata'"),
        ("jsonl", [{"id": "a", "prompt": "Hi", "metadata": {"answer": "x"}}], '{"answers": [...]}'),
        ("jsonl", [{"id": "a", "prompt": "Hi", "metadata": {"answers": [""]}}], "non-empty"),
        ("squad", [], "known: iheval"),
    ],
)
def test_malformed_records_are_named(tmp_path, suite, records, word):
    path = write(tmp_path / "a.json", records, as_list=True)
    with pytest.raises(SuiteUnusable) as error:
        read_suite(suite, path)
    assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_unusable_files(tmp_path):
    (tmp_path / "broken.jsonl").write_text(json.dumps(IFEVAL) + "\n{\n")
    (tmp_path / "twice.jsonl").write_text(json.dumps(IFEVAL) + '\n{"a": 1, "a": 2}\n')
    (tmp_path / "twice.json").write_text('[{"a": 1, "a": 2}]')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\n")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}" * 9999)[:-20])
    for name, word in (
        ("broken.jsonl", "record 2 is not JSON"),
        ("twice.jsonl", "record 2 has a key twice: a is named twice"),
        ("twice.json", "a record has a key twice: a is named twice"),
        ("empty.jsonl", "no record"),
        ("latin.jsonl", "utf-8"),
        ("cut.jsonl.gz", "Truncated"),
        ("missing.jsonl", "does not exist"),
    ):
        with pytest.raises(SuiteUnusable, match=word):
            read_suite("ifeval", str(tmp_path / name))
    with pytest.raises(SuiteUnusable, match="--data"):
        read_suite("ifeval", None)
    with pytest.raises(SuiteUnusable, match="nq has"):
        read_suite("ifbench", None, distractors=4)
    with pytest.raises(SuiteUnusable, match="more than the file has"):
        read_suite("nq", write(tmp_path / "few.jsonl", QUESTIONS[:3]), distractors=4)
