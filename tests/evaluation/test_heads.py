"""`agd-vllm heads`: files of questions, what is ranked, and what cannot be."""

import json
import subprocess
import sys

import pytest
import torch
from command_line import fails
from conftest import CHECKOUT

from agd_vllm.evaluation.head_ranking import HeadRanking, read_questions
from agd_vllm.evaluation.suites import SuiteUnusable
from agd_vllm.prompts.heads import read_head_set
from agd_vllm.prompts.tokenizer import load_tokenizer

FACTS = [
    ("who owns the red boat", "Ondine Farrow", "The red boat in the harbour belongs to Ondine Farrow."),
    ("where does the blue train stop", "Kirby Marsh", "The blue train stops at Kirby Marsh and nowhere else."),
]
OF_NQ = [{"question": q, "answers": [a, "other"], "ctxs": [{"title": "T", "text": text}]} for q, a, text in FACTS]
AS_ROWS = [{"id": q, "metadata": {"question": q, "answers": [a], "context": text}} for q, a, text in FACTS]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_a_head_set_names_its_keys_once(tmp_path):
    path = tmp_path / "heads.json"
    path.write_text('{"heads": [[0, 1]], "heads": [[0, 2]]}')
    with pytest.raises(ValueError, match=f"^--roi-heads {path}: heads is named twice; keep one of the two$"):
        read_head_set(str(path), 30, 9)


def test_both_kinds_of_files_hold_the_same_questions(tmp_path):
    of_nq = read_questions(write(tmp_path / "nq.jsonl", OF_NQ), None)
    assert read_questions(write(tmp_path / "rows.jsonl", AS_ROWS), None) == of_nq
    assert read_questions(write(tmp_path / "nq.jsonl", OF_NQ), 1) == of_nq[:1]
    for question, (asked, answer, text) in zip(of_nq, FACTS, strict=True):
        assert question.answer == answer
        assert text in question.open_book and text not in question.closed_book
        assert f"Question: {asked}?" in question.open_book and f"Question: {asked}?" in question.closed_book


class Relevances:
    """In the scorer's place: head (0, 1) answers from the context, head (1, 0) without it, (0, 0) always."""

    class hf:
        num_layers, num_heads = 2, 2

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.explained = []

    def head_relevance(self, tokens, targets):
        text = self._tokenizer.decode(tokens)
        self.explained.append([tokens[position + 1] for position, _ in targets[:-1]] + [targets[-1][1]])
        assert [token for _, token in targets] == self.explained[-1]
        assert targets[-1][0] == len(tokens) - 1
        return torch.tensor([[4.0, 4.0], [0.0, 0.0]] if "Document" in text else [[30.0, 0.0], [30.0, 0.0]])


def test_heads_are_ranked_by_the_difference_of_their_shares(tmp_path, smollm2):
    tokenizer = load_tokenizer(str(smollm2))
    scorer = Relevances(tokenizer)
    ranking = HeadRanking(scorer, tokenizer, 512)
    ranking.add_all(read_questions(write(tmp_path / "nq.jsonl", OF_NQ), None))
    # Shares, so that relevances of other sizes weigh the same; every token of the answer is explained in its place.
    assert ranking.top("in-context", 2) == [((0, 1), 0.5), ((0, 0), 0.0)]
    assert ranking.top("parametric", 1) == [((1, 0), 0.5)]
    answers = [tokenizer.decode(tokens) for tokens in scorer.explained]
    assert answers == ["Ondine Farrow"] * 2 + ["Kirby Marsh"] * 2
    ranking = HeadRanking(scorer, tokenizer, 20)
    with pytest.raises(ValueError, match=r"question 1: .* 20 tokens"):
        ranking.add_all(read_questions(write(tmp_path / "nq.jsonl", OF_NQ), None))


def test_the_command_writes_a_head_set_for_decode(tmp_path, smollm2):
    path, data = tmp_path / "heads.json", write(tmp_path / "nq.jsonl", OF_NQ)
    command = [sys.executable, "-m", "agd_vllm", "heads", data, "--model", str(smollm2), "--kind", "in-context"]
    command += ["--top", "12", "--output", str(path)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert (found["kind"], found["model"]) == ("in-context", str(smollm2))
    assert len(read_head_set(str(path), 30, 9)) == len(found["scores"]) == 12
    assert found["scores"] == sorted(found["scores"], reverse=True)
    assert found["scores"][-1] > 0 and sum(found["scores"]) < 1


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"INPUT": "missing.jsonl"}, "does not exist"),
        ({"--top": "271"}, "270 heads (30 layers of 9)"),
        ({"--top": "0"}, "--top"),
        ({"--output": "missing/heads.json"}, "no such folder"),
        ({"--kind": "visual"}, "visual"),
        ({"--model": "./missing"}, "./missing"),
    ],
)
def test_unusable_arguments(capsys, tmp_path, smollm2, change, word):
    data = write(tmp_path / "nq.jsonl", OF_NQ)
    options = {"INPUT": data, "--model": str(smollm2), "--kind": "parametric", "--top": "3"}
    options |= {"--output": str(tmp_path / "heads.json")} | change
    source = options.pop("INPUT")
    assert word in fails(capsys, 2, "heads", source, *(part for pair in options.items() for part in pair))


@pytest.mark.parametrize(
    ("record", "word"),
    [
        ({"question": "who"}, "it has no 'metadata'"),
        ({"metadata": {"question": "who", "answers": ["a"]}}, "it has no 'context'"),
        ({**OF_NQ[0], "answers": []}, "answers"),
        ({**OF_NQ[0], "ctxs": []}, "non-empty"),
    ],
)
def test_malformed_questions_are_named(tmp_path, record, word):
    with pytest.raises(SuiteUnusable) as error:
        read_questions(write(tmp_path / "nq.jsonl", [OF_NQ[0], record]), None)
    assert "record 2 is no record of questions" in str(error.value)
    assert word in str(error.value)
